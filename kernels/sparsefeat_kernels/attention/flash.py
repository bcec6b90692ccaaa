"""The log-sum-exp of every row and head, and the attention's output, by a flash loop over blocks of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, next_power_of_2, tl
from .scores import LOG2_E, additive, aligned, load_heads, mask_arguments, masked_scores

__all__ = ["flash"]


@jit
def _attention_flash_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    out_ptr,
    lse_ptr,
    mask_ptr,
    group_ptr,
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
    stride_value_batch,
    stride_value_head,
    stride_value_token,
    stride_value_d,
    stride_out_batch,
    stride_out_head,
    stride_out_row,
    stride_mask_batch,
    stride_mask_head,
    stride_mask_row,
    stride_mask_token,
    OUTPUT: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D_VALUE: tl.constexpr,
):
    """Log-sum-exp (natural) of a block of rows of one head; with OUTPUT the attention's output, else nothing for batch
    rows that are not counted."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key
    if not OUTPUT:
        g = tl.load(group_ptr + b)
        n_tokens = tl.where((g >= 0) & (g < groups), n_tokens, 0)
    query_ptr += (b * stride_query_batch + head * stride_query_head) * ALIGN
    key_ptr += (b * stride_key_batch + key_head * stride_key_head) * ALIGN
    value_ptr += (b * stride_value_batch + key_head * stride_value_head) * ALIGN
    mask_ptr += b * stride_mask_batch + head * stride_mask_head
    column, column_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D_VALUE)
    q = load_heads(query_ptr, row, rows, column, stride_query_row, stride_query_d, D, ALIGN)
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_ROWS], tl.float32)
    o = tl.zeros([BLOCK_ROWS, BLOCK_D_VALUE], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        k = load_heads(key_ptr, token, n_tokens, column, stride_key_token, stride_key_d, D, ALIGN)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [BLOCK_ROWS, BLOCK_TOKENS]
        scores = masked_scores(scores, mask_ptr, row, rows, token, n_tokens, stride_mask_row, stride_mask_token, MASK)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(highest - base)
        p = tl.exp2(scores - base[:, None])
        sums = sums * shrink + tl.sum(p, axis=1)
        highest = higher
        if OUTPUT:
            v = load_heads(value_ptr, token, n_tokens, column_value, stride_value_token, stride_value_d, D_VALUE, ALIGN)
            o = tl.dot(p.to(v.dtype), v, o * shrink[:, None], input_precision="ieee")  # [BLOCK_ROWS, BLOCK_D_VALUE]
    sums = tl.where(sums == 0, 1.0, sums)  # every key is masked: highest is -inf, and o is 0
    lse = (highest + tl.log2(sums)) * 0.6931471805599453
    tl.store(lse_ptr + (b * heads + head) * rows + row, lse, mask=row < rows)
    if OUTPUT:
        o *= (1 / sums)[:, None]
        out_ptr += b * stride_out_batch + head * stride_out_head
        inside = (row < rows)[:, None] & (column_value < D_VALUE)[None, :]
        ptrs = out_ptr + row[:, None] * stride_out_row + column_value[None, :]
        tl.store(ptrs, o.to(out_ptr.dtype.element_ty), mask=inside)


def flash(
    groups: int,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    mask: Tensor | None,
    group: Tensor,
    out: Tensor | None,
) -> Tensor:
    """The log-sum-exp [batch, heads, n], of the counted batch rows, or of all and with the output."""
    (batch, heads, n, d), n_tokens, full = query.shape, key.shape[2], query.dtype == torch.float32
    lse = query.new_empty(batch, heads, n, dtype=torch.float32)
    mask_pointer, mask_strides, masked = mask_arguments(additive(mask, query, key), query)
    v = key if value is None else value
    o = query if out is None else out
    align, (query_strides, key_strides, value_strides) = aligned(query, key, v)
    block_d, block_d_value = (next_power_of_2(max(width, 16)) for width in (d, v.shape[3]))
    wide = max(block_d, block_d_value) > 128
    huge = max(block_d, block_d_value) > 256  # a VAE's one head of 512: 64 rows and two stages take 192 KiB, and spill
    block_rows = 16 if full or huge else 64
    block_tokens = 64 >> (int(full) + int(wide))
    with torch.cuda.device_of(query):
        _attention_flash_kernel[(-(-n // block_rows), heads, batch)](
            query, key, v, o, lse, mask_pointer, group.contiguous(), heads, n, n_tokens, groups, scale * LOG2_E,
            heads // key.shape[1], *query_strides, *key_strides, *value_strides, *o.stride()[:3], *mask_strides,
            OUTPUT=out is not None, MASK=masked, ALIGN=align, D=d, D_VALUE=v.shape[3], BLOCK_ROWS=block_rows,
            BLOCK_TOKENS=block_tokens, BLOCK_D=block_d, BLOCK_D_VALUE=block_d_value, num_warps=8 if wide else 4,
            num_stages=1 if full or huge else 2,
        )  # fmt: skip
    return lse
