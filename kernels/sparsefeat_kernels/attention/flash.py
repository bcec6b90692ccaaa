"""The log-sum-exp of every row and head, and the attention's output, by a flash loop over blocks of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, next_power_of_2, tl
from .tiles import (
    LOG2_E,
    aligned,
    heads_of,
    load_tile,
    mask_argument,
    softmax_start,
    softmax_step,
    store_tile,
    tile_scores,
)

__all__ = ["flash"]


@jit
def _attention_flash_kernel(
    query,
    key,
    value,
    out,
    lse_ptr,
    mask,
    group_ptr,
    heads,
    rows,
    n_tokens,
    groups,
    scale,
    heads_per_key,
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
    column, column_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D_VALUE)
    q = load_tile(query, b, head, row, rows, column, D, ALIGN)
    highest, sums = softmax_start(BLOCK_ROWS)
    o = tl.zeros([BLOCK_ROWS, BLOCK_D_VALUE], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        k = load_tile(key, b, key_head, token, n_tokens, column, D, ALIGN)
        scores = tile_scores(q, k, scale, mask, b, head, row, rows, token, n_tokens, MASK)
        p, shrink, _, highest, sums = softmax_step(scores, highest, sums)
        if OUTPUT:
            o *= shrink[:, None]  # before the load: after it ptxas spills a head of 160 in fp32 on sm_90
            v = load_tile(value, b, key_head, token, n_tokens, column_value, D_VALUE, ALIGN)
            o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_D_VALUE]
    sums = tl.where(sums == 0, 1.0, sums)  # every key is masked: highest is -inf, and o is 0
    lse = (highest + tl.log2(sums)) * 0.6931471805599453
    tl.store(lse_ptr + (b * heads + head) * rows + row, lse, mask=row < rows)
    if OUTPUT:
        store_tile(out, b, head, row, rows, column_value, D_VALUE, o * (1 / sums)[:, None])


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
    bias, masked = mask_argument(mask, query, key)
    v = key if value is None else value
    align, (queries, keys, values) = aligned(query, key, v)
    block_d, block_d_value = (next_power_of_2(max(width, 16)) for width in (d, v.shape[3]))
    wide = max(block_d, block_d_value) > 128
    huge = max(block_d, block_d_value) > 256  # a VAE's one head of 512: 64 rows and two stages take 192 KiB, and spill
    block_rows = 16 if full or huge else 64
    block_tokens = 64 >> (int(full) + int(wide))
    with torch.cuda.device_of(query):
        _attention_flash_kernel[(-(-n // block_rows), heads, batch)](
            queries, keys, values, heads_of(query if out is None else out), lse, bias, group.contiguous(), heads, n,
            n_tokens, groups, scale * LOG2_E, heads // key.shape[1],
            OUTPUT=out is not None, MASK=masked, ALIGN=align, D=d, D_VALUE=v.shape[3], BLOCK_ROWS=block_rows,
            BLOCK_TOKENS=block_tokens, BLOCK_D=block_d, BLOCK_D_VALUE=block_d_value, num_warps=8 if wide else 4,
            num_stages=1 if full or huge else 2,
        )  # fmt: skip
    return lse
