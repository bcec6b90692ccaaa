"""The code of the dead latents as a dense one, on a GPU, where its decode and its gradients are then products of matrices.

The code has a column for each dead latent. What an entry of no latent of `dead` would add is not known here: it puts NaN into
the row's first column, which reaches all of the row's result, and the gradient of the first dead latent.

Weights in bfloat16 are multiplied as they are, and an fp32 value is then two bf16 numbers (dense_code.py), which stand in one
matrix: one product adds them up in fp32. What they are multiplied by is there twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import implementation, jit_over_rows, row_chunks, sum_dtype, tl
from ..products import wide_product
from .dense_code import dense_code, padded, picked

__all__ = ["add_dense_weight_gradient", "dense_decode", "dense_grad_values", "dense_pays"]

# With so many latents a product costs what gathering one entry's row does, by an H200's rates: 2 d bytes from the L2 cache at
# 12 TB/s beside 4 d FLOPs (two parts) at 500 TFLOP/s; in fp32 4 d bytes beside 2 d FLOPs at 45, and the gradients gather at
# half that rate. float16 has no room for the small numbers of a gradient.
DENSE = {torch.bfloat16: 20, torch.float32: 8, torch.float64: 8}
# The dense code of the rows that are taken together, and what it is multiplied by or makes.
ROWS_BYTES = 62 << 20


def dense_pays(W: Tensor, dead: Tensor, k_aux: int) -> bool:
    """Whether on W's device a code of k_aux entries a row among the latents `dead` is best multiplied as a dense one here."""
    return (W.is_cuda or _by_kernels(W)) and 0 < dead.shape[0] <= DENSE.get(W.dtype, 0) * k_aux


def _by_kernels(x: Tensor) -> bool:
    """Those of this file are tried with those of `weight_gradient`."""
    return implementation("weight_gradient", x) == "triton"


def dense_decode(values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    rows, d, n_dead = len(values), W_dec.shape[1], len(dead)
    out, places = W_dec.new_empty(rows, d), _places(dead, len(W_dec))
    W = W_dec.index_select(0, dead if _in_one(W_dec) else torch.cat((dead, dead)))
    for part in _chunks(rows, n_dead, d, W):
        z = _dense(_of(values, part), _of(indices, part), places, n_dead, W_dec, beside=True)
        _of(out, part).copy_(wide_product(z, W))
    return out


def dense_grad_values(grad: Tensor, values: Tensor, indices: Tensor, dead: Tensor, W_dec: Tensor) -> Tensor:
    """The dot products of every row's gradient with all the dead latents' decoder rows; the code's are picked out."""
    n_dead = len(dead)
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    places, W = _places(dead, len(W_dec)), W_dec.index_select(0, dead).T
    for part in _chunks(len(values), n_dead, 0, W):
        some, at = _of(values, part), _of(indices, part)
        dots = grad.new_empty(len(some), padded(n_dead), dtype=sum_dtype(W))
        wide_product(_of(grad, part), W, dots[:, :n_dead])
        if _by_kernels(W_dec):
            picked(dots, some, at, len(places), _of(out, part), places)
            continue
        owned, columns = _owned(some, at, places)
        found = dots.gather(1, columns.clamp_min(0)).masked_fill_(columns < 0, torch.nan)
        out[part] = torch.where(owned, found, 0)
    return out


def add_dense_weight_gradient(
    weight: Tensor, bias: Tensor | None, values: Tensor, indices: Tensor, x: Tensor, dead: Tensor, shift: Tensor | None
) -> None:
    """Add the code's `weight_gradient` to the rows `dead` of `weight` and, unless it is None, of `bias`. shift: None for 0."""
    n_dead, places = len(dead), _places(dead, len(weight))
    added = added_bias = None
    for part in _chunks(len(x), n_dead, x.shape[1], x):
        z = _dense(_of(values, part), _of(indices, part), places, n_dead, x, beside=False)
        some = _of(x, part)
        if not _in_one(x):  # without shift, which then goes by the sums of the bias: x - shift in bf16 would lose more
            some = torch.cat((some, some))
        elif shift is not None:
            some = some - shift.to(some.dtype)
        product = wide_product(z.T, some)
        added = product if added is None else added.add_(product)
        if bias is not None or shift is not None:
            sums = z.sum(0, dtype=added.dtype)
            added_bias = sums if added_bias is None else added_bias.add_(sums)
    if added is None:  # of no rows
        return
    shift = None if _in_one(x) else shift
    if _by_kernels(x):
        _add_triton(weight, bias, added, added_bias, dead, shift)
        return
    if shift is not None and added_bias is not None:
        added.addcmul_(added_bias[:, None], shift.to(added.dtype), value=-1)
    for total, more in ((weight, added), (bias, added_bias)):
        if total is not None and more is not None:
            total.index_copy_(0, dead, (total.index_select(0, dead) + more).to(total.dtype))


def _in_one(x: Tensor) -> bool:
    """Whether a value is one number of x's dtype, and not two."""
    return x.dtype == sum_dtype(x)


def _of(tensor: Tensor, part: slice) -> Tensor:
    """tensor[part], itself where that is all of it: a view takes the host as long as an allocation."""
    return tensor if part.stop - part.start == tensor.shape[0] else tensor[part]


def _chunks(rows: int, n_dead: int, d: int, x: Tensor) -> list[slice]:
    """Of rows whose dense code, in fp32 or in two parts, and the other factor or the result fit into ROWS_BYTES."""
    return row_chunks(rows, (padded(n_dead) + d) * sum_dtype(x).itemsize, ROWS_BYTES, 128)


def _places(dead: Tensor, n_latents: int) -> Tensor:
    """int32 [n_latents], the column of every latent, -1 of one that is not dead."""
    places = torch.full((n_latents,), -1, dtype=torch.int32, device=dead.device)
    return places.scatter_(0, dead, torch.arange(dead.shape[0], dtype=torch.int32, device=dead.device))


def _dense(values: Tensor, indices: Tensor, places: Tensor, n_dead: int, like: Tensor, beside: bool) -> Tensor:
    """The code in like's dtype, its parts beside each other, [rows, parts n_dead], or one below the other, [parts rows,
    n_dead]. Entries of one row and latent add up, in their order."""
    if _by_kernels(like):
        return dense_code(values, indices, len(places), n_dead, like.dtype, places, beside)
    owned, columns = _owned(values, indices, places)
    clean = torch.where(owned, values, 0).masked_fill_(owned & (columns < 0), torch.nan)
    z = values.new_zeros(len(values), n_dead, dtype=sum_dtype(like))
    rows = torch.arange(len(values), device=values.device)[:, None].expand_as(columns)
    # Which sorts the entries, where a scatter would add those of one place in any order.
    z.index_put_((rows, columns.clamp_min(0)), clean.to(z.dtype), accumulate=True)
    if _in_one(like):
        return z
    high = z.to(like.dtype)
    return torch.cat((high, (z - high).to(like.dtype)), 1 if beside else 0)


def _owned(values: Tensor, indices: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries count, and the column of each as `_places` has it, int64."""
    inside = indices.clamp(0, len(places) - 1)
    return (values != 0) & (inside == indices), places[inside.long()].long()


# ------------------------------------------------------------------------------------------------------------ Triton


@jit_over_rows
def _auxk_add_kernel(
    weight_ptr,
    bias_ptr,
    added_ptr,
    added_bias_ptr,
    dead_ptr,
    shift_ptr,
    d,
    stride_shift_d,
    BLOCK_D: tl.constexpr,
):
    """One dead latent: its sums, less those of its bias times shift, added to its gradients. All but shift contiguous."""
    place = tl.program_id(0).to(tl.int64)
    latent = tl.load(dead_ptr + place)
    bias = 0.0
    if added_bias_ptr is not None:
        bias = tl.load(added_bias_ptr + place)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < d
        total = tl.load(added_ptr + place * d + column, mask=inside, other=0.0)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + column.to(tl.int64) * stride_shift_d, mask=inside, other=0.0)
            total -= bias * shift.to(tl.float32)
        total += tl.load(weight_ptr + latent * d + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(weight_ptr + latent * d + column, total, mask=inside)
    if bias_ptr is not None:
        tl.store(bias_ptr + latent, tl.load(bias_ptr + latent) + bias)


def _add_triton(
    weight: Tensor, bias: Tensor | None, added: Tensor, added_bias: Tensor | None, dead: Tensor, shift: Tensor | None
) -> None:
    """Into contiguous `weight` and `bias`."""
    n_dead, d = added.shape
    stride = 0 if shift is None else shift.stride(0)
    with torch.cuda.device_of(weight):
        _auxk_add_kernel[(n_dead,)](
            weight, bias, added, added_bias, dead.contiguous(), shift, d, stride, BLOCK_D=1024, num_warps=4
        )  # fmt: skip
