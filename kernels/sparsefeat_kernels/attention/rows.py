"""attention_rows: what the rows of an attention add up to, without its matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, jit, next_power_of_2, ops, register, registered, sum_dtype, tl
from ..flop_formulas import register_flop_formula
from .scores import additive, check_device, check_query_and_key, dense_probabilities, scale_of, score_blocks
from .tiles import LOG2_E, aligned, load_tile, mask_argument, softmax_start, softmax_step, tile_scores

__all__ = ["attention_rows"]


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
    scale = scale_of(query, scale)
    lse, entropy, mass = ops.attention_rows(query, key, scale, mask, marked)
    return lse, entropy, mass


def reference(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of attention_rows: dense, any dtype."""
    scores, p = dense_probabilities(query, key, scale, mask)
    marked = p.new_zeros(p.shape[-1]) if marked is None else marked.to(p.dtype)
    mass = (p * (marked if marked.dim() == 1 else marked[:, None, None, :])).sum(-1)
    return scores.logsumexp(-1), -torch.xlogy(p, p).sum(-1), mass


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


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _attention_rows_kernel(
    query,
    key,
    mask,
    marked_ptr,
    lse_ptr,
    entropy_ptr,
    mass_ptr,
    heads,
    rows,
    n_tokens,
    scale,
    heads_per_key,
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
    marked_ptr += b * stride_marked_batch
    column = tl.arange(0, BLOCK_D)
    q = load_tile(query, b, head, row, rows, column, D, ALIGN)
    highest, sums = softmax_start(BLOCK_ROWS)
    spread = tl.zeros([BLOCK_ROWS], tl.float32)
    mass = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        k = load_tile(key, b, head // heads_per_key, token, n_tokens, column, D, ALIGN)
        scores = tile_scores(q, k, scale, mask, b, head, row, rows, token, n_tokens, MASK)
        before, sums_before = highest, sums
        p, shrink, base, highest, sums = softmax_step(scores, before, sums_before)
        # 2^-1000 is 0; a finite difference keeps the product below 0 where nothing was summed, or only masked keys.
        rise = tl.maximum(before - base, -1000.0)
        spread = (spread + rise * sums_before) * shrink
        spread += tl.sum(tl.where(scores == float("-inf"), 0.0, p * (scores - base[:, None])), axis=1)
        if MARKED:
            is_marked = tl.load(marked_ptr + token * stride_marked_token, mask=token < n_tokens, other=0) != 0
            mass = mass * shrink + tl.sum(tl.where(is_marked[None, :], p, 0.0), axis=1)
    sums = tl.where(sums == 0, 1.0, sums)  # every key is masked: highest is -inf, the other sums are 0
    log = tl.log2(sums)
    at = (b * heads + head) * rows + row
    tl.store(lse_ptr + at, (highest + log) * 0.6931471805599453, mask=row < rows)
    tl.store(entropy_ptr + at, (log - spread / sums) * 0.6931471805599453, mask=row < rows)
    if MARKED:
        mass /= sums
    tl.store(mass_ptr + at, mass, mask=row < rows)


def _attention_rows_triton(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, marked: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, heads, n, d), full = query.shape, query.dtype == torch.float32
    lse, entropy, mass = (query.new_empty(batch, heads, n, dtype=torch.float32) for _ in range(3))
    bias, masked = mask_argument(mask, query, key)
    marks = query if marked is None else marked.expand(batch, key.shape[2]).to(torch.int8)
    align, (queries, keys) = aligned(query, key)
    block_d = next_power_of_2(max(d, 16))
    block_rows, block_tokens = 16 if full else 64, 32 if full or block_d > 128 else 64
    with torch.cuda.device_of(query):
        _attention_rows_kernel[(-(-n // block_rows), heads, batch)](
            queries, keys, bias, marks, lse, entropy, mass, heads, n, key.shape[2], scale * LOG2_E,
            heads // key.shape[1], *((0, 0) if marked is None else marks.stride()), MASK=masked,
            MARKED=marked is not None, ALIGN=align, D=d,
            BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens, BLOCK_D=block_d, num_warps=4,
            num_stages=1 if full or block_d > 256 else 2,
        )  # fmt: skip
    return lse, entropy, mass


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


register(
    "attention_rows",
    "(Tensor query, Tensor key, float scale, Tensor? mask, Tensor? marked) -> (Tensor, Tensor, Tensor)",
    _attention_rows,
    fake=_attention_rows_fake,
)


@register_flop_formula(registered.attention_rows)
def _attention_rows_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d
