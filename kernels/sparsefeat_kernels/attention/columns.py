"""attention_column_sums_: what every key of an attention receives, without its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, jit, next_power_of_2, ops, register, registered, tl
from ..flop_formulas import register_flop_formula
from .scores import (
    add_to_group,
    additive,
    arguments,
    check_accumulator,
    check_lse,
    check_query_and_key,
    counted_rows,
    dense_probabilities,
    head_weights,
    score_blocks,
)
from .tiles import LOG2_E, aligned, heads_of, load_rows, load_tile, mask_argument, tile_scores, weight_argument

__all__ = ["attention_column_sums_"]


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


def _check(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    check_query_and_key("attention_column_sums", query, key, mask)
    check_lse(lse, query)
    check_accumulator("sums", sums, (key.shape[2],), query, head_weight, group)


# --------------------------------------------------------------------------------------------------------------- CPU


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
def _attention_column_kernel(
    query,
    key,
    lse,
    mask,
    group_ptr,
    partial_ptr,
    heads,
    rows,
    n_tokens,
    groups,
    scale,
    heads_per_key,
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
    column = tl.arange(0, BLOCK_D)
    k = load_tile(key, b, head // heads_per_key, token, n_tokens, column, D, ALIGN)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    for start in range(0, counted, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        q = load_tile(query, b, head, row, rows, column, D, ALIGN)
        scores = tile_scores(q, k, scale, mask, b, head, row, rows, token, n_tokens, MASK)
        of_row = load_rows(lse, b, head, row, rows, float("inf")) * 1.4426950408889634
        of_row = tl.where(of_row == float("-inf"), float("inf"), of_row)
        # Past the last row there is no query, but 0 times a NaN or an infinity of the key is NaN.
        total += tl.sum(tl.where((row < rows)[:, None], tl.exp2(scores - of_row[:, None]), 0.0), axis=0)
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
    bias, masked = mask_argument(mask, query, key)
    align, (queries, keys) = aligned(query, key)
    group = group.contiguous()
    block_d = next_power_of_2(max(d, 16))
    block_rows, block_tokens = 32 if full or block_d > 128 else 64, 16 if full else 64
    with torch.cuda.device_of(query):
        _attention_column_kernel[(-(-n_tokens // block_tokens), heads, batch)](
            queries, keys, heads_of(lse), bias, group, partial, heads, n, n_tokens, sums.shape[0], scale * LOG2_E,
            heads // key.shape[1], MASK=masked, ALIGN=align, D=d, BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens,
            BLOCK_D=block_d, num_warps=4,
            num_stages=1 if full else 2,
        )  # fmt: skip
        _attention_column_join_kernel[(sums.shape[0], -(-n_tokens // 256))](
            sums, partial, weight_argument(head_weight), group, batch, heads, n_tokens, *sums.stride(), WEIGHTED=head_weight is not None,
            BLOCK_TOKENS=256, num_warps=4,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


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
    _check(sums, query, key, lse, scale, mask, head_weight, group)
    if sums.numel() == 0 or query.numel() == 0:
        return
    run = (
        _attention_column_sums_triton
        if implementation("attention_column_sums", query) == "triton"
        else _attention_column_sums_cpu
    )
    run(sums, query, key, lse, scale, mask, head_weight, group)


register(
    "attention_column_sums_",
    "(Tensor(a!) sums, Tensor query, Tensor key, Tensor lse, float scale, Tensor? mask, Tensor? head_weight, "
    "Tensor group) -> ()",
    _attention_column_sums,
    fake=_check,
    mutates=("sums",),
)


@register_flop_formula(registered.attention_column_sums_)
def _attention_column_sums_flops(sums: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d
