"""The code of the dead latents as a dense one, on a GPU, where its decode and its gradients are then products of matrices.

The code z is [rows, width]: a column for each dead latent, and at least one more, so that rows begin at multiples of 16
numbers. What an entry of no latent of `dead` would add is not known here: it puts NaN into column n_dead, which reaches the
row's result, and the sums of all dead latents.

Weights in bfloat16 are multiplied as they are. An fp32 value v is then two bf16 numbers, whose sum is within 2^-18 |v| of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation, jit_over_rows, row_chunks, sum_dtype, tl
from ..products import wide_product

__all__ = ["add_dense_weight_gradient", "dense_decode", "dense_grad_values", "dense_pays"]

# With so many latents a product costs what gathering one entry's row does, by an H200's rates: 2 d bytes from the L2 cache at
# 12 TB/s beside 4 d FLOPs (two parts) at 500 TFLOP/s; in fp32 4 d bytes beside 2 d FLOPs at 45, and the gradients gather at
# half that rate. float16 has no room for the small numbers of a gradient.
DENSE = {torch.bfloat16: 20, torch.float32: 8, torch.float64: 8}
# The dense code of the rows that are taken together, and their results.
ROWS_BYTES = 48 << 20


def dense_pays(W: Tensor, dead: Tensor, k_aux: int) -> bool:
    """Whether on W's device a code of k_aux entries a row among the latents `dead` is best multiplied as a dense one here."""
    return (W.is_cuda or _by_kernels(W)) and 0 < dead.shape[0] <= DENSE.get(W.dtype, 0) * k_aux


def _by_kernels(x: Tensor) -> bool:
    """Those of this file are tried with those of `weight_gradient`."""
    return implementation("weight_gradient", x) == "triton"


def dense_decode(values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    d, width = W_dec.shape[1], _width(len(dead))
    out = W_dec.new_empty(len(values), d)
    places, W = _places(dead, len(W_dec)), _rows_of(W_dec, dead, width)
    for part in _chunks(len(values), width, d, W):
        first, *more = _dense(values[part], indices[part], places, len(dead), W)
        total = wide_product(first, W)
        for z in more:
            total += wide_product(z, W)
        out[part] = total
    return out


def dense_grad_values(grad: Tensor, values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    """The dot products of every row's gradient with all the dead latents' decoder rows; the code's are picked out."""
    width = _width(len(dead))
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    places, W = _places(dead, len(W_dec)), _rows_of(W_dec, dead, width)
    for part in _chunks(len(values), width, 0, W):
        dots = wide_product(grad[part], W.T)
        if _by_kernels(W_dec):
            _picked_triton(dots, values[part], indices[part], places, out[part])
            continue
        owned, columns = _owned(values[part], indices[part], places)
        dots[:, len(dead)] = torch.nan
        out[part] = torch.where(owned, dots.gather(1, torch.where(columns < 0, len(dead), columns)), 0)
    return out


def add_dense_weight_gradient(
    weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor, x: Tensor, dead: Tensor, shift: Tensor
) -> None:
    """Add the code's `weight_gradient` to the rows `dead` of `weight` and `bias`."""
    d, n_dead, width, dtype = x.shape[1], len(dead), _width(len(dead)), sum_dtype(x)
    places = _places(dead, len(weight))
    added, added_bias = x.new_zeros(width, d, dtype=dtype), x.new_zeros(width, dtype=dtype)
    for part in _chunks(len(x), width, d, x):
        z = _dense(values[part], indices[part], places, n_dead, x)
        centred = _parts(x[part].to(dtype) - shift.to(dtype), x.dtype)
        for number, of_z in enumerate(z):  # the product of both low parts is below the rounding of all others
            for of_x in centred[: len(centred) - number]:
                added += wide_product(of_z.T, of_x)
        added_bias += z.sum((0, 1), dtype=dtype)
    added += added[n_dead].clone()  # 0, or the NaN of an entry of no dead latent
    added_bias += added_bias[n_dead].clone()
    for total, more in ((weight, added), (bias, added_bias)):
        total.index_copy_(0, dead, (total.index_select(0, dead) + more[:n_dead]).to(total.dtype))


def _width(n_dead: int) -> int:
    return 16 * (n_dead // 16 + 1)


def _chunks(rows: int, width: int, d: int, x: Tensor) -> list[slice]:
    """Of rows whose dense code, in fp32 or in two parts, and two results fit into ROWS_BYTES."""
    return row_chunks(rows, (width + 2 * d) * sum_dtype(x).itemsize, ROWS_BYTES, 128)


def _places(dead: Tensor, n_latents: int) -> Tensor:
    """int32 [n_latents], the column of every latent, -1 of one that is not dead."""
    places = torch.full((n_latents,), -1, dtype=torch.int32, device=dead.device)
    return places.scatter_(0, dead, torch.arange(dead.shape[0], dtype=torch.int32, device=dead.device))


def _rows_of(W: Tensor, dead: Tensor, width: int) -> Tensor:
    """[width, d]: the rows `dead` of W, then zeros."""
    rows = W.new_zeros(width, W.shape[1])
    torch.index_select(W, 0, dead, out=rows[: dead.shape[0]])
    return rows


def _parts(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, ...]: numbers of this dtype that add up to x."""
    if dtype == x.dtype:
        return x[None]
    parts = x.new_empty(2, *x.shape, dtype=dtype)
    parts[0] = x
    torch.sub(x, parts[0], out=parts[1])
    return parts


def _dense(values: Tensor, indices: Tensor, places: Tensor, n_dead: int, like: Tensor) -> Tensor:
    """[parts, rows, width], of like's dtype. Entries of one row and latent add up, in their order."""
    width = _width(n_dead)
    if _by_kernels(like):
        return _dense_triton(values, indices, places, n_dead, width, like.dtype)
    owned, columns = _owned(values, indices, places)
    clean = torch.where(owned, values, 0).masked_fill_(owned & (columns < 0), torch.nan)
    z = values.new_zeros(len(values), width, dtype=sum_dtype(like))
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(columns)
    # Which sorts the entries, where a scatter would add those of one place in any order.
    z.index_put_((rows, torch.where(columns < 0, n_dead, columns)), clean.to(z.dtype), accumulate=True)
    return _parts(z, like.dtype)


def _owned(values: Tensor, indices: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries count, and the column of each as `_places` has it, int64."""
    inside = indices.clamp(0, len(places) - 1)
    return (values != 0) & (inside == indices), places[inside.long()].long()


# ------------------------------------------------------------------------------------------------------------ Triton


@jit_over_rows
def _auxk_dense_kernel(
    values_ptr,
    indices_ptr,
    places_ptr,
    high_ptr,
    low_ptr,
    n_latents,
    k,
    n_dead,
    width,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    BLOCK_K: tl.constexpr,
):
    """One row, BLOCK_K of its entries after the other, into zeros: of equal columns the first has the sum."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_K)
    for start in range(0, k, BLOCK_K):
        entry = (start + lane).to(tl.int64)
        value = tl.load(values_ptr + row * stride_values_row + entry * stride_values_k, mask=entry < k, other=0.0)
        index = tl.load(indices_ptr + row * stride_indices_row + entry * stride_indices_k, mask=entry < k, other=0)
        owned = (value != 0.0) & (index >= 0) & (index < n_latents)  # NaN != 0: it counts
        column = tl.load(places_ptr + index, mask=owned, other=0)
        value = tl.where(column < 0, float("nan"), value.to(tl.float32))
        column = tl.where(column < 0, n_dead, column)  # [BLOCK_K]
        same = (column[:, None] == column[None, :]) & owned[None, :]  # [BLOCK_K, BLOCK_K]
        earlier = tl.max((same & (lane[None, :] < lane[:, None])).to(tl.int32), axis=1)
        first = owned & (earlier == 0)
        total = value
        if tl.max((owned & (earlier > 0)).to(tl.int32), axis=0) > 0:
            total = tl.sum(tl.where(same, value[None, :], 0.0), axis=1)
        at = row * width + column
        total += tl.load(high_ptr + at, mask=first, other=0.0).to(tl.float32)
        if low_ptr is not None:
            total += tl.load(low_ptr + at, mask=first, other=0.0).to(tl.float32)
        high = total.to(high_ptr.dtype.element_ty)
        tl.store(high_ptr + at, high, mask=first)
        if low_ptr is not None:
            tl.store(low_ptr + at, (total - high.to(tl.float32)).to(low_ptr.dtype.element_ty), mask=first)
        tl.debug_barrier()  # the next entries read what these have stored


@jit_over_rows
def _auxk_picked_kernel(
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
    """Of every entry the dot product of its row and latent; NaN of a latent without one."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entry < entries
    row, place = entry // k, entry % k
    value = tl.load(values_ptr + row * stride_values_row + place * stride_values_k, mask=inside, other=0.0)
    index = tl.load(indices_ptr + row * stride_indices_row + place * stride_indices_k, mask=inside, other=0)
    owned = (value != 0.0) & (index >= 0) & (index < n_latents)
    column = tl.load(places_ptr + index, mask=owned, other=-1)
    dot = tl.load(dots_ptr + row * width + column, mask=column >= 0, other=float("nan"))
    tl.store(out_ptr + entry, tl.where(owned, dot, 0.0), mask=inside)


def _dense_triton(
    values: Tensor, indices: Tensor, places: Tensor, n_dead: int, width: int, dtype: torch.dtype
) -> Tensor:
    rows, k = values.shape
    z = values.new_zeros(1 if dtype == torch.float32 else 2, rows, width, dtype=dtype)
    with torch.cuda.device_of(values):
        _auxk_dense_kernel[(rows,)](
            values, indices, places, z[0], z[1] if len(z) > 1 else None, len(places), k, n_dead, width,
            *values.stride(), *indices.stride(), BLOCK_K=32, num_warps=1,
        )  # fmt: skip
    return z


def _picked_triton(dots: Tensor, values: Tensor, indices: Tensor, places: Tensor, out: Tensor) -> None:
    """Into `out`, contiguous."""
    k, width = values.shape[1], dots.shape[1]
    with torch.cuda.device_of(values):
        _auxk_picked_kernel[(-(-values.numel() // 1024),)](
            dots, values, indices, places, out, values.numel(), len(places), k, width, *values.stride(),
            *indices.stride(), BLOCK_ENTRIES=1024, num_warps=4,
        )  # fmt: skip
