"""attention_rows and attention_column_sums_: what an attention's rows and columns add up to, without its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import implementation, jit, next_power_of_2, ops, register, sum_dtype, tl
from .scores import (
    LOG2_E,
    add_to_group,
    additive,
    aligned,
    arguments,
    check_accumulator,
    check_device,
    check_lse,
    check_query_and_key,
    counted_rows,
    dense_probabilities,
    head_weights,
    load_heads,
    mask_arguments,
    masked_scores,
    score_blocks,
)

__all__ = ["attention_column_sums_", "attention_rows"]


def attention_rows(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    marked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, entropy, and probability of a marked set of keys, of every row of an attention.

        s = scale query[b, h, i] . key[b, h, t] + mask;    lse = log(sum over t of exp(s))
        p = exp(s - lse);    entropy = -sum over t of p log(p);    mass = sum over t with marked[b, t] of p

    With the text's keys marked in a joint attention, mass is the share of an image position's attention that goes to
    the text. lse is what `attention_tap_` and `attention_column_sums_` ask for.

    Args:
        query: [batch, heads, n, d], float32, float64, bfloat16 or float16; key: [batch, key heads, t, d], where key
            heads divide heads. Strides are free.
        scale: default 1 / sqrt(d).
        mask: bool (True is kept) or a floating bias, [batch, t] or broadcastable to [batch, heads, n, t].
        marked: bool, [t] or [batch, t]. Default: no key.

    Returns:
        lse, entropy (both in nats) and mass, each [batch, heads, n] float32 (float64 for a float64 query). A row without
        any key that is not masked has lse -inf, entropy 0 and mass 0; a score of NaN or +inf makes the row's three values
        NaN (mass 0 where no key is marked). The same bits every run. No gradients.

    Cost: 2 batch heads n t d FLOPs and batch heads n t exponentials in one pass; reads query once, key once every 64
    rows (from the cache), writes 12 batch heads n bytes. Scratch: none on a GPU, 3 MiB on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [0.0]]]])
        >>> attention_rows(query, key, marked=torch.tensor([True, False]))
        (tensor([[[0.6931]]]), tensor([[[0.6931]]]), tensor([[[0.5000]]]))
    """
    scale, _ = arguments(query, scale, None)
    lse, entropy, mass = ops.attention_rows(query, key, scale, mask, marked)
    return lse, entropy, mass


def attention_column_sums_(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> None:
    """Add the attention that every key receives, from all rows and heads, to sums, in place.

        sums[group[b], t] += sum over h, i of head_weight[h] exp(scale query[b, h, i] . key[b, h, t] + mask - lse[b, h, i])

    Args:
        sums: [groups, t] float32 (float64 for a float64 query); strides are free.
        lse: [batch, heads, n], from `attention_rows` or the attention itself; -inf: the row gives nothing.
        query, key, scale, mask, head_weight, group: as in `attention_map_`.

    Sums are fp32, rows in blocks in order, then heads and the batch rows of one group in order: the same bits every run,
    no atomics. No gradients.

    Cost: 2 B heads n t d FLOPs and B heads n t exponentials, B the rows that are counted; half of an attention. Scratch:
    4 batch heads t bytes on a GPU, 1 MiB on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> query, key = torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 2, 1)
        >>> sums = torch.zeros(1, 2)
        >>> attention_column_sums_(sums, query, key, attention_rows(query, key)[0])
        >>> sums  # three rows, half of each
        tensor([[1.5000, 1.5000]])
    """
    scale, group = arguments(query, scale, group)
    ops.attention_column_sums_(sums, query, key, lse, scale, mask, head_weight, group)


def reference(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of attention_rows: dense, any dtype."""
    scores, p = dense_probabilities(query, key, scale, mask)
    marked = p.new_zeros(p.shape[-1]) if marked is None else marked.to(p.dtype)
    mass = (p * (marked if marked.dim() == 1 else marked[:, None, None, :])).sum(-1)
    return scores.logsumexp(-1), -torch.xlogy(p, p).sum(-1), mass


def reference_column_sums(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> Tensor:
    """The meaning of attention_column_sums_: the new sums. Dense, any dtype."""
    scores = dense_probabilities(query, key, scale, mask)[0]
    p = torch.where((lse == -torch.inf)[..., None], 0, (scores - lse[..., None]).exp())
    weight = query.new_ones(query.shape[1]) if head_weight is None else head_weight.to(query.dtype)
    received = torch.einsum("bhnt,h->bt", p, weight)
    sums = sums.clone()
    for b, g in enumerate(group.tolist()):
        if 0 <= g < len(sums):
            sums[g] += received[b]
    return sums


def _check_rows(query: Tensor, key: Tensor, mask: Tensor | None, marked: Tensor | None) -> None:
    check_query_and_key("attention_rows", query, key, mask)
    if marked is None:
        return
    if marked.dtype != torch.bool:
        raise TypeError(f"marked must be bool, got {marked.dtype}")
    shapes = (key.shape[2],), (key.shape[0], key.shape[2])
    if tuple(marked.shape) not in shapes:
        raise ValueError(f"marked must be [t] or [batch, t], {shapes[0]} or {shapes[1]}, got {tuple(marked.shape)}")
    check_device("marked", marked, query)


def _check_column_sums(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    check_query_and_key("attention_column_sums", query, key, mask)
    check_lse(lse, query)
    check_accumulator("sums", sums, (key.shape[2],), query, head_weight, group)


# --------------------------------------------------------------------------------------------------------------- CPU


def _attention_rows_cpu(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, n, _ = query.shape
    lse, entropy, mass = (query.new_zeros(batch, heads, n, dtype=sum_dtype(query)) for _ in range(3))
    bias = additive(mask, query, key)
    marks = None if marked is None else marked.to(mass.dtype).expand(batch, -1)
    for b in range(batch):
        for block, rows, scores in score_blocks(query[b], key[b], scale, None if bias is None else bias[b]):
            highest = scores.amax(-1)
            base = torch.where(highest == -torch.inf, 0, highest)
            # Below -800 the exponential is 0 in fp64 too, and 0 times a finite number is 0.
            scores.sub_(base[..., None]).clamp_(min=-800)
            p = scores.exp()
            sums = p.sum(-1)
            sums.masked_fill_(sums == 0, 1)  # every key is masked: highest is -inf, the other sums are 0
            log = sums.log()
            lse[b, block, rows] = highest + log
            if marks is not None:
                mass[b, block, rows] = (p @ marks[b]) / sums
            entropy[b, block, rows] = log - p.mul_(scores).sum(-1) / sums
    return lse, entropy, mass


def _attention_column_sums_cpu(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    bias, weight = additive(mask, query, key), head_weights(head_weight, query)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(score - inf) is 0
    for b, g in counted_rows(group, sums.shape[0]):
        received = sums.new_zeros(sums.shape[1:])
        for block, rows, scores in score_blocks(query[b], key[b], scale, None if bias is None else bias[b]):
            p = scores.sub_(lse[b, block, rows, None]).exp_()
            received += weight[block] @ p.sum(1)
        add_to_group(sums, g, received)


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _attention_rows_kernel(
    query_ptr,
    key_ptr,
    mask_ptr,
    marked_ptr,
    lse_ptr,
    entropy_ptr,
    mass_ptr,
    heads,
    rows,
    n_tokens,
    scale,
    heads_per_key,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_query_d,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_d,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    stride_mask_token,
    stride_marked_batch,
    stride_marked_token,
    MASK: tl.constexpr,
    MARKED: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one head over all keys: sums of 2^(s - m), of 2^(s - m) (s - m) and of the marked 2^(s - m),
    with m the largest score so far and scores in powers of two."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query_ptr += (b * stride_query_batch + head * stride_query_head) * ALIGN
    key_ptr += (b * stride_key_batch + (head // heads_per_key) * stride_key_head) * ALIGN
    mask_ptr += b * stride_mask_batch + head * stride_mask_head
    marked_ptr += b * stride_marked_batch
    column = tl.arange(0, BLOCK_D)
    q = load_heads(query_ptr, row, rows, column, stride_query_row, stride_query_d, D, ALIGN)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    spread = tl.zeros([BLOCK_ROWS], tl.float32)
    mass = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        k = load_heads(key_ptr, token, n_tokens, column, stride_key_token, stride_key_d, D, ALIGN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_ROWS, BLOCK_TOKENS]
        scores = masked_scores(scores, mask_ptr, row, rows, token, n_tokens, stride_mask_row, stride_mask_token, MASK)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        # 2^-1000 is 0; a finite difference keeps the product below 0 where nothing was summed, or only masked keys.
        rise = tl.maximum(highest - base, -1000.0)
        shrink = tl.exp2(rise)
        scores -= base[:, None]
        p = tl.exp2(scores)
        spread = (spread + rise * sums) * shrink
        spread += tl.sum(tl.where(scores == float("-inf"), 0.0, p * scores), axis=1)
        sums = sums * shrink + tl.sum(p, axis=1)
        if MARKED:
            is_marked = tl.load(marked_ptr + token * stride_marked_token, mask=token < n_tokens, other=0) != 0
            mass = mass * shrink + tl.sum(tl.where(is_marked[None, :], p, 0.0), axis=1)
        highest = higher
    sums = tl.where(sums == 0, 1.0, sums)  # every key is masked: highest is -inf, the other sums are 0
    log = tl.log2(sums)
    at = (b * heads + head) * rows + row
    tl.store(lse_ptr + at, (highest + log) * 0.6931471805599453, mask=row < rows)
    tl.store(entropy_ptr + at, (log - spread / sums) * 0.6931471805599453, mask=row < rows)
    if MARKED:
        mass /= sums
    tl.store(mass_ptr + at, mass, mask=row < rows)


@jit
def _attention_column_kernel(
    query_ptr,
    key_ptr,
    lse_ptr,
    mask_ptr,
    group_ptr,
    partial_ptr,
    heads,
    rows,
    n_tokens,
    groups,
    scale,
    heads_per_key,
    stride_query_batch,
    stride_query_head,
    stride_query_row,
    stride_query_d,
    stride_key_batch,
    stride_key_head,
    stride_key_token,
    stride_key_d,
    stride_lse_batch,
    stride_lse_head,
    stride_lse_row,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    stride_mask_token,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """What a block of keys of one head receives from all rows; 0 in batch rows that are not counted."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    g = tl.load(group_ptr + b)
    counted = tl.where((g >= 0) & (g < groups), rows, 0)
    query_ptr += (b * stride_query_batch + head * stride_query_head) * ALIGN
    key_ptr += (b * stride_key_batch + (head // heads_per_key) * stride_key_head) * ALIGN
    mask_ptr += b * stride_mask_batch + head * stride_mask_head
    lse_ptr += b * stride_lse_batch + head * stride_lse_head
    column = tl.arange(0, BLOCK_D)
    k = load_heads(key_ptr, token, n_tokens, column, stride_key_token, stride_key_d, D, ALIGN)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    for start in range(0, counted, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        q = load_heads(query_ptr, row, rows, column, stride_query_row, stride_query_d, D, ALIGN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_ROWS, BLOCK_TOKENS]
        scores = masked_scores(scores, mask_ptr, row, rows, token, n_tokens, stride_mask_row, stride_mask_token, MASK)
        lse = tl.load(lse_ptr + row * stride_lse_row, mask=row < rows, other=float("inf")) * 1.4426950408889634
        lse = tl.where(lse == float("-inf"), float("inf"), lse)
        # Past the last row there is no query, but 0 times a NaN or an infinity of the key is NaN.
        total += tl.sum(tl.where((row < rows)[:, None], tl.exp2(scores - lse[:, None]), 0.0), axis=0)
    tl.store(partial_ptr + (b * heads + head) * n_tokens + token, total, mask=token < n_tokens)


@jit
def _attention_column_join_kernel(
    sums_ptr,
    partial_ptr,
    weight_ptr,
    group_ptr,
    batch,
    heads,
    n_tokens,
    stride_sums_group,
    stride_sums_token,
    WEIGHTED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    """A block of keys of one group: its batch rows and their heads, one after the other."""
    g = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    for other in range(0, batch):
        b = tl.cast(other, tl.int64)
        mine = tl.load(group_ptr + b).to(tl.int64) == g
        for h in range(0, tl.where(mine, heads, 0)):
            received = tl.load(partial_ptr + (b * heads + h) * n_tokens + token, mask=token < n_tokens, other=0.0)
            if WEIGHTED:
                received *= tl.load(weight_ptr + h)
            total += received
    ptrs = sums_ptr + g * stride_sums_group + token * stride_sums_token
    tl.store(ptrs, tl.load(ptrs, mask=token < n_tokens) + total, mask=token < n_tokens)


def _attention_rows_triton(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, n, d), full = query.shape, query.dtype == torch.float32
    lse, entropy, mass = (query.new_empty(batch, heads, n, dtype=torch.float32) for _ in range(3))
    mask_pointer, mask_strides, masked = mask_arguments(additive(mask, query, key), query)
    marks = query if marked is None else marked.expand(batch, key.shape[2]).to(torch.int8)
    align, (query_strides, key_strides) = aligned(query, key)
    block_d = next_power_of_2(max(d, 16))
    block_rows, block_tokens = 16 if full else 64, 32 if full or block_d > 128 else 64
    with torch.cuda.device_of(query):
        _attention_rows_kernel[(-(-n // block_rows), heads, batch)](
            query, key, mask_pointer, marks, lse, entropy, mass, heads, n, key.shape[2], scale * LOG2_E,
            heads // key.shape[1], *query_strides, *key_strides, *mask_strides,
            *((0, 0) if marked is None else marks.stride()), MASK=masked, MARKED=marked is not None, ALIGN=align, D=d,
            BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, BLOCK_D=block_d, num_warps=4,
            num_stages=1 if full or block_d > 256 else 2,
        )  # fmt: skip
    return lse, entropy, mass


def _attention_column_sums_triton(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    (batch, heads, n, d), n_tokens, full = query.shape, key.shape[2], query.dtype == torch.float32
    partial = query.new_empty(batch, heads, n_tokens, dtype=torch.float32)
    mask_pointer, mask_strides, masked = mask_arguments(additive(mask, query, key), query)
    align, (query_strides, key_strides) = aligned(query, key)
    weight = query if head_weight is None else head_weight.float().contiguous()
    group = group.contiguous()
    block_d = next_power_of_2(max(d, 16))
    block_rows, block_tokens = 32 if full or block_d > 128 else 64, 16 if full else 64
    with torch.cuda.device_of(query):
        _attention_column_kernel[(-(-n_tokens // block_tokens), heads, batch)](
            query, key, lse, mask_pointer, group, partial, heads, n, n_tokens, sums.shape[0], scale * LOG2_E,
            heads // key.shape[1], *query_strides, *key_strides, *lse.stride(), *mask_strides, MASK=masked, ALIGN=align,
            D=d, BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, BLOCK_D=block_d, num_warps=4,
            num_stages=1 if full else 2,
        )  # fmt: skip
        _attention_column_join_kernel[(sums.shape[0], -(-n_tokens // 256))](
            sums, partial, weight, group, batch, heads, n_tokens, *sums.stride(), WEIGHTED=head_weight is not None,
            BLOCK_TOKENS=256, num_warps=4,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


def _attention_rows(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(query, key, mask, marked)
    if query.numel() == 0 or key.shape[2] == 0:
        lse, entropy, mass = (query.new_zeros(query.shape[:3], dtype=sum_dtype(query)) for _ in range(3))
        return lse.fill_(-torch.inf), entropy, mass
    if implementation("attention_rows", query) == "triton":
        return _attention_rows_triton(query, key, scale, mask, marked)
    lse, entropy, mass = _attention_rows_cpu(query, key, scale, mask, marked)
    return lse, entropy, mass


def _attention_rows_fake(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    _check_rows(query, key, mask, marked)
    lse, entropy, mass = (query.new_empty(query.shape[:3], dtype=sum_dtype(query)) for _ in range(3))
    return lse, entropy, mass


def _attention_column_sums(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    _check_column_sums(sums, query, key, lse, mask, head_weight, group)
    if sums.numel() == 0 or query.numel() == 0:
        return
    run = (
        _attention_column_sums_triton
        if implementation("attention_column_sums", query) == "triton"
        else _attention_column_sums_cpu
    )
    run(sums, query, key, lse, scale, mask, head_weight, group)


def _attention_column_sums_fake(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    _check_column_sums(sums, query, key, lse, mask, head_weight, group)


register(
    "attention_rows",
    "(Tensor query, Tensor key, float scale, Tensor? mask, Tensor? marked) -> (Tensor, Tensor, Tensor)",
    _attention_rows,
    fake=_attention_rows_fake,
)

register(
    "attention_column_sums_",
    "(Tensor(a!) sums, Tensor query, Tensor key, Tensor lse, float scale, Tensor? mask, Tensor? head_weight, "
    "Tensor group) -> ()",
    _attention_column_sums,
    fake=_attention_column_sums_fake,
    mutates=("sums",),
)


@register_flop_formula(ops.attention_rows)
def _attention_rows_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d


@register_flop_formula(ops.attention_column_sums_)
def _attention_column_sums_flops(sums: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d
