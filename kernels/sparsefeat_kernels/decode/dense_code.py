"""A padded code as a dense one, for products of matrices on a GPU, and what of a dense result belongs to its entries.

An fp32 value v becomes two numbers in bf16, whose sum is within 2^-18 |v| of it: what the weights are multiplied by in their own
dtype, with sums in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, jit_over_rows, tl

__all__ = ["dense_code", "padded", "picked"]


def padded(n: int) -> int:
    """So that rows begin at multiples of 16 numbers."""
    return -(-n // 16) * 16


def dense_code(
    values: Tensor, indices: Tensor, n_latents: int, n_columns: int, dtype: torch.dtype, places: Tensor | None = None,
    beside: bool = False,
) -> Tensor:  # fmt: skip
    """The code in `dtype`, its parts (two of bfloat16, one of float32) one below the other, [parts rows, n_columns], or beside
    each other, [rows, parts n_columns]; by a kernel, in rows that are padded. Entries of one row and column add up, in their
    order; those of value 0 or of an index outside of 0 .. n_latents - 1 do not count.

    places: int32 [n_latents], the column of each latent; without it column i is latent i's. A latent whose place is -1 puts NaN
    into its row's first column.
    """
    (rows, k), parts = values.shape, 1 if dtype == torch.float32 else 2
    height, columns = (rows, parts * n_columns) if beside else (parts * rows, n_columns)
    width = padded(columns)
    z = values.new_empty(height, width, dtype=dtype)
    with torch.cuda.device_of(values):
        _sparse_decode_dense_kernel[(rows,)](
            values, indices, places, z, rows, n_latents, k, n_columns, width, *values.stride(), *indices.stride(),
            PARTS=parts, BESIDE=beside, BLOCK=512, BLOCK_K=32, num_warps=4,
        )  # fmt: skip
    return z if width == columns else z[:, :columns]


def picked(
    dots: Tensor, values: Tensor, indices: Tensor, n_latents: int, out: Tensor, places: Tensor | None = None
) -> None:
    """Into `out` [rows, k], contiguous, the numbers of `dots` [rows, width] at the entries' columns, as `dense_code` has them; 0 of
    entries that do not count, NaN of a latent without a place."""
    with torch.cuda.device_of(values):
        _sparse_decode_picked_kernel[(-(-values.numel() // 512),)](
            dots, values, indices, places, out, values.numel(), n_latents, values.shape[1], dots.shape[1],
            *values.stride(), *indices.stride(), BLOCK_ENTRIES=512, num_warps=4,
        )  # fmt: skip


@jit
def _entry(values_ptr, indices_ptr, places_ptr, entry, n_latents, k, stride_values_k, stride_indices_k):
    """Value and column of a row's entries, and which of them count. Of a latent without a place: NaN in the first column."""
    value = tl.load(values_ptr + entry * stride_values_k, mask=entry < k, other=0.0)
    index = tl.load(indices_ptr + entry * stride_indices_k, mask=entry < k, other=0)
    owned = (value != 0.0) & (index >= 0) & (index < n_latents)  # NaN != 0: it counts
    value, column = value.to(tl.float32), tl.where(owned, index, 0).to(tl.int32)
    if places_ptr is not None:
        column = tl.load(places_ptr + column, mask=owned, other=0)
        value, column = tl.where(column < 0, float("nan"), value), tl.maximum(column, 0)
    return value, column, owned


@jit_over_rows
def _sparse_decode_dense_kernel(
    values_ptr,
    indices_ptr,
    places_ptr,
    z_ptr,
    rows,
    n_latents,
    k,
    n_columns,
    width,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    PARTS: tl.constexpr,
    BESIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: zeros, then its entries, all at once where each has a column of its own, else BLOCK_K after the other."""
    row = tl.program_id(0).to(tl.int64)
    width = tl.multiple_of(width, 16)
    values_ptr += row * stride_values_row
    indices_ptr += row * stride_indices_row
    high_ptr = z_ptr + row * width
    low_ptr = high_ptr + (n_columns if BESIDE else rows.to(tl.int64) * width)
    dtype = z_ptr.dtype.element_ty
    lane = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        tl.store(high_ptr + start + lane, tl.zeros([BLOCK], dtype), mask=start + lane < width)
        if PARTS == 2 and not BESIDE:
            tl.store(low_ptr + start + lane, tl.zeros([BLOCK], dtype), mask=start + lane < width)
    tl.debug_barrier()  # other warps write there, and read what these wrote
    # Every entry leaves its number. An entry whose number is not there shares its column.
    number_type = tl.int16 if PARTS == 2 else tl.int32
    number_ptr = high_ptr.to(tl.pointer_type(number_type), bitcast=True)
    for start in range(0, k, BLOCK):
        entry = (start + lane).to(tl.int64)
        _, column, owned = _entry(
            values_ptr, indices_ptr, places_ptr, entry, n_latents, k, stride_values_k, stride_indices_k
        )
        tl.store(number_ptr + column, entry.to(number_type), mask=owned)
    tl.debug_barrier()
    shared = tl.zeros([BLOCK], tl.int32)
    for start in range(0, k, BLOCK):
        entry = (start + lane).to(tl.int64)
        _, column, owned = _entry(
            values_ptr, indices_ptr, places_ptr, entry, n_latents, k, stride_values_k, stride_indices_k
        )
        number = tl.load(number_ptr + column, mask=owned, other=0)
        shared |= (owned & (number != entry.to(number_type))).to(tl.int32)
    alone = (tl.max(shared, axis=0) == 0) & (k <= 65536)  # beyond, numbers of 16 bits come again
    tl.debug_barrier()
    for start in range(0, k, BLOCK):
        entry = (start + lane).to(tl.int64)
        value, column, owned = _entry(
            values_ptr, indices_ptr, places_ptr, entry, n_latents, k, stride_values_k, stride_indices_k
        )
        value = tl.where(alone, value, 0.0)
        high = value.to(dtype)
        tl.store(high_ptr + column, high, mask=owned)
        if PARTS == 2:
            tl.store(low_ptr + column, (value - high.to(tl.float32)).to(dtype), mask=owned)
    if not alone:
        tl.debug_barrier()
        lane_k = tl.arange(0, BLOCK_K)
        for start in range(0, k, BLOCK_K):  # of equal columns the first has the sum
            entry = (start + lane_k).to(tl.int64)
            value, column, owned = _entry(
                values_ptr, indices_ptr, places_ptr, entry, n_latents, k, stride_values_k, stride_indices_k
            )
            same = (column[:, None] == column[None, :]) & owned[None, :]  # [BLOCK_K, BLOCK_K]
            earlier = tl.max((same & (lane_k[None, :] < lane_k[:, None])).to(tl.int32), axis=1)
            first = owned & (earlier == 0)
            total = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
            total += tl.load(high_ptr + column, mask=first, other=0.0).to(tl.float32)
            if PARTS == 2:
                total += tl.load(low_ptr + column, mask=first, other=0.0).to(tl.float32)
            high = total.to(dtype)
            tl.store(high_ptr + column, high, mask=first)
            if PARTS == 2:
                tl.store(low_ptr + column, (total - high.to(tl.float32)).to(dtype), mask=first)
            tl.debug_barrier()  # the next entries read what these have stored


@jit_over_rows
def _sparse_decode_picked_kernel(
    dots_ptr,
    values_ptr,
    indices_ptr,
    places_ptr,
    out_ptr,
    entries,
    n_latents,
    k,
    width,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    BLOCK_ENTRIES: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entry < entries
    row, place = entry // k, entry % k
    value = tl.load(values_ptr + row * stride_values_row + place * stride_values_k, mask=inside, other=0.0)
    index = tl.load(indices_ptr + row * stride_indices_row + place * stride_indices_k, mask=inside, other=0)
    owned = (value != 0.0) & (index >= 0) & (index < n_latents)
    column = tl.where(owned, index, -1).to(tl.int32)
    if places_ptr is not None:
        column = tl.load(places_ptr + column, mask=owned, other=-1)
    dot = tl.load(dots_ptr + row * width + column, mask=column >= 0, other=float("nan"))
    tl.store(out_ptr + entry, tl.where(owned, dot, 0.0), mask=inside)
