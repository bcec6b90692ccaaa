"""weight_gradient: what both gradients of weights are, summed latent by latent over the latent-major view of a code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..code import check_code
from ..dispatch import (
    block_bytes,
    implementation,
    jit,
    jit_over_rows,
    next_power_of_2,
    ops,
    register,
    row_chunks,
    sum_dtype,
    tl,
)
from ..threads import conducted, each, together
from .csr import latent_major, sorted_entries
from .gradient_memory import empty_gradient

__all__ = ["check_gradient", "weight_gradient", "weight_gradient_cpu"]

# A bound on the centred fp32 copy of x on the CPU path: beyond it, a block of columns at a time.
CENTRED_BYTES = 32 << 20
# And on the sums that are made before they go to their places, which stay in the L2 caches of two cores: 31 ms for a
# gradient of 20,480 x 1280 of 256 rows where 4 MiB take 39 and 256 KiB 37.
RESULT_BYTES = 2 << 20


def reference(coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """z^T (x - shift) and the column sums of z, where z [rows, n_latents] is the dense code."""
    z = coefficients.new_zeros(x.shape[0], n_latents).scatter_add(1, indices.long(), coefficients)
    return z.T @ (x - shift), z.sum(0)


def weight_gradient(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    """Sum over entries of `coefficient * (x[row] - shift)` and of `coefficient`, latent by latent.

        weight[i] = sum over entries (r, j) with indices[r, j] == i of coefficients[r, j] * (x[r] - shift)
        bias[i]   = sum over the same entries of coefficients[r, j]

    Both weight gradients are of this form: the decoder's with the code and the output's gradient (shift 0), the
    encoder's with the gradient of the code and the input (shift b_pre).

    Args:
        coefficients: [rows, k]; entries of 0 are skipped. fp32 (fp64 with fp64 `x`).
        indices: [rows, k] int32 or int64; entries out of range are skipped.
        x: [rows, d]; shift: [d]; n_latents: the number of rows of the result.

    Returns:
        weight [n_latents, d] in x's dtype, summed in fp32 (fp64 for fp64) in row order and rounded once; bias
        [n_latents] in the dtype of the sum. The same bits on every run.

    Cost: 3 * entries * d FLOPs; reads d values of x an entry, writes n_latents * d. Scratch on a CPU: 36 MiB and
    the sorted code; on a GPU 16 MiB of partial sums and the sorted code, which takes 7 launches.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> c, i = torch.tensor([[2.0], [3.0]]), torch.tensor([[1], [1]], dtype=torch.int32)
        >>> weight_gradient(c, i, torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2), 3)
        (tensor([[0., 0.],
                [2., 3.],
                [0., 0.]]), tensor([0., 5., 0.]))
    """
    weight, bias = ops.weight_gradient(coefficients, indices, x, shift, n_latents)
    return weight, bias


@conducted
def weight_gradient_cpu(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(x)
    row_ids, order, offsets = latent_major(indices, coefficients, n_latents)
    owned = int(offsets[-1])
    weight = empty_gradient(n_latents, x.shape[1], like=x)
    if owned == 0:
        return weight.zero_(), torch.zeros(n_latents, dtype=dtype, device=x.device)
    row_ids, sorted_coefficients = row_ids[:owned], coefficients.reshape(-1)[order[:owned]].to(dtype)

    def summed(of: Tensor, rows: Tensor, entries: slice, bags: Tensor) -> Tensor:
        # embedding_bag sums each latent's rows in order; without entries a latent's sum is 0
        return torch.nn.functional.embedding_bag(
            rows[entries], of, bags, mode="sum", per_sample_weights=sorted_coefficients[entries],
            include_last_offset=True,
        )  # fmt: skip

    one = torch.ones(1, 1, dtype=dtype, device=x.device)
    bias = summed(one, torch.zeros_like(row_ids), slice(None), offsets)[:, 0]
    shifted = bool(shift.any())
    width = max(1, CENTRED_BYTES // (max(x.shape[0], 1) * dtype.itemsize))  # all columns, unless there are many rows
    for start in range(0, x.shape[1], width):
        columns = slice(start, start + width)
        centred = x[:, columns].to(dtype)
        centred = (centred - shift[columns].to(dtype) if shifted else centred).contiguous()
        blocks = row_chunks(n_latents, centred.shape[1] * dtype.itemsize, block_bytes(x, RESULT_BYTES))
        ends = offsets[[block.stop for block in blocks]].tolist()

        def some(block_and_entries: tuple[slice, slice], centred: Tensor = centred, columns: slice = columns) -> None:
            block, entries = block_and_entries
            bags = offsets[block.start : block.stop + 1] - entries.start
            weight[block, columns] = summed(centred, row_ids, entries, bags)

        entries = [slice(first, last) for first, last in zip([0, *ends], ends, strict=False)]
        together(each(some, zip(blocks, entries, strict=True)))
    return weight, bias


# ------------------------------------------------------------------------------------------------------------ Triton


# One program sums a segment of the sorted entries, wherever latents begin and end in it: one that fires on most rows keeps no
# program busy longer than others. What lies in one segment is a result; of a latent that crosses into later segments there
# are partial sums, which a second kernel adds in order. Nothing waits for the device.

SEGMENT = 128  # entries
PARTIAL_BYTES = 16 << 20  # a bound on the partial sums; beyond it segments are longer


@jit_over_rows
def _weight_gradient_entries_kernel(
    keys_ptr,
    order_ptr,
    coefficients_ptr,
    latents_ptr,
    row_ids_ptr,
    sorted_ptr,
    entries,
    k,
    stride_coefficients_row,
    stride_coefficients_k,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Latent, row and coefficient of every entry in the new order: without a detour when their sums are made."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entry < entries
    position = tl.load(order_ptr + entry, mask=inside, other=0)
    row, place = position // k, position % k
    place_ptr = coefficients_ptr + row * stride_coefficients_row + place * stride_coefficients_k
    tl.store(latents_ptr + entry, tl.load(keys_ptr + entry, mask=inside, other=0).to(tl.int32), mask=inside)
    tl.store(row_ids_ptr + entry, row.to(tl.int32), mask=inside)
    tl.store(sorted_ptr + entry, tl.load(place_ptr, mask=inside, other=0.0).to(tl.float32), mask=inside)


@jit
def _entry(entry, last, latents_ptr, row_ids_ptr, coefficients_ptr, x_ptr, stride_x_row, n_latents, inside):
    """Latent, coefficient and row of x; n_latents, 0 and zeros from `last` on."""
    latent = tl.load(latents_ptr + entry, mask=entry < last, other=n_latents)
    coefficient = tl.load(coefficients_ptr + entry, mask=entry < last, other=0.0)
    row = tl.load(row_ids_ptr + entry, mask=entry < last, other=0).to(tl.int64)
    x = tl.load(x_ptr + row * stride_x_row, mask=inside & (latent < n_latents), other=0.0)
    return latent, coefficient, x


@jit
def _add_entry(
    total, bias, latent, coefficient, x, following, before, n_latents, d, shift, inside, of_bias, weight_ptr, bias_ptr,
    partial_ptr, partial_bias_ptr,
):  # fmt: skip
    """The sums of the entry's latent, stored where it is the last of them; what the next entry goes on with."""
    total += coefficient * (x.to(tl.float32) - shift)
    bias += coefficient
    ends = (latent != following) & (latent < n_latents)
    if ends & (latent == before):
        tl.store(partial_ptr, total, mask=inside)
        tl.store(partial_bias_ptr, bias, mask=of_bias)
    whole = ends & (latent != before)
    tl.store(weight_ptr + latent.to(tl.int64) * d, total, mask=inside & whole)
    tl.store(bias_ptr + latent, bias, mask=of_bias & whole)
    return tl.where(latent != following, 0.0, total), tl.where(latent != following, 0.0, bias)


@jit_over_rows
def _weight_gradient_segment_kernel(
    latents_ptr,
    row_ids_ptr,
    coefficients_ptr,
    x_ptr,
    shift_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    partial_bias_ptr,
    entries,
    n_latents,
    d,
    segment_length,
    stride_x_row,
    stride_x_d,
    stride_shift_d,
    BLOCK_D: tl.constexpr,
):
    """Sums of the latents in one segment of the sorted entries and one block of columns, an entry after the other.
    partial[0] of a segment: the latent that began in an earlier one; partial[1]: the latent that goes on in the next."""
    segment = tl.program_id(0).to(tl.int64)
    first = segment * segment_length
    last = tl.minimum(first + segment_length, entries)
    before = tl.load(latents_ptr + first - 1, mask=first > 0, other=-1)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    inside, of_bias = column < d, tl.program_id(1) == 0
    shift = tl.load(shift_ptr + column * stride_shift_d, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_D]
    x_ptr += column * stride_x_d
    weight_ptr += column
    partial_ptr += 2 * segment * d + column
    partial_bias_ptr += 2 * segment
    total = tl.zeros([BLOCK_D], tl.float32)
    bias = 0.0
    for start in range(first, last, 4):  # four rows of x are read before anything is stored
        latent0, coefficient0, x0 = _entry(
            start, last, latents_ptr, row_ids_ptr, coefficients_ptr, x_ptr, stride_x_row, n_latents, inside
        )
        latent1, coefficient1, x1 = _entry(
            start + 1, last, latents_ptr, row_ids_ptr, coefficients_ptr, x_ptr, stride_x_row, n_latents, inside
        )
        latent2, coefficient2, x2 = _entry(
            start + 2, last, latents_ptr, row_ids_ptr, coefficients_ptr, x_ptr, stride_x_row, n_latents, inside
        )
        latent3, coefficient3, x3 = _entry(
            start + 3, last, latents_ptr, row_ids_ptr, coefficients_ptr, x_ptr, stride_x_row, n_latents, inside
        )
        latent4 = tl.load(latents_ptr + start + 4, mask=start + 4 < entries, other=-1)
        total, bias = _add_entry(
            total, bias, latent0, coefficient0, x0, latent1, before, n_latents, d, shift, inside, of_bias,
            weight_ptr, bias_ptr, partial_ptr, partial_bias_ptr,
        )  # fmt: skip
        total, bias = _add_entry(
            total, bias, latent1, coefficient1, x1, latent2, before, n_latents, d, shift, inside, of_bias,
            weight_ptr, bias_ptr, partial_ptr, partial_bias_ptr,
        )  # fmt: skip
        total, bias = _add_entry(
            total, bias, latent2, coefficient2, x2, latent3, before, n_latents, d, shift, inside, of_bias,
            weight_ptr, bias_ptr, partial_ptr, partial_bias_ptr,
        )  # fmt: skip
        total, bias = _add_entry(
            total, bias, latent3, coefficient3, x3, latent4, before, n_latents, d, shift, inside, of_bias,
            weight_ptr, bias_ptr, partial_ptr, partial_bias_ptr,
        )  # fmt: skip
    latent = tl.load(latents_ptr + last - 1)
    after = tl.load(latents_ptr + last, mask=last < entries, other=-1)
    if (latent == after) & (latent < n_latents):
        slot = (latent != before).to(tl.int64)
        tl.store(partial_ptr + slot * d, total, mask=inside)
        tl.store(partial_bias_ptr + slot, bias, mask=of_bias)


@jit_over_rows
def _weight_gradient_join_kernel(
    latents_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    partial_bias_ptr,
    entries,
    n_latents,
    d,
    segment_length,
    BLOCK_D: tl.constexpr,
):
    """The latent that a segment leaves open, and its parts in the segments after it, one after the other."""
    segment = tl.program_id(0).to(tl.int64)  # of the last nothing is open: it has no program
    first = segment * segment_length
    last = first + segment_length
    before = tl.load(latents_ptr + first - 1, mask=first > 0, other=-1)
    latent = tl.load(latents_ptr + last - 1)
    if (latent == tl.load(latents_ptr + last)) & (latent != before) & (latent < n_latents):
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.load(partial_ptr + (2 * segment + 1) * d + column, mask=column < d, other=0.0)  # [BLOCK_D]
        bias = tl.load(partial_bias_ptr + 2 * segment + 1)
        while tl.load(latents_ptr + last, mask=last < entries, other=-1) == latent:
            segment += 1
            last += segment_length
            total += tl.load(partial_ptr + 2 * segment * d + column, mask=column < d, other=0.0)
            bias += tl.load(partial_bias_ptr + 2 * segment)
        tl.store(weight_ptr + latent.to(tl.int64) * d + column, total, mask=column < d)
        tl.store(bias_ptr + latent, bias, mask=tl.program_id(1) == 0)


def _weight_gradient_triton(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    d, entries = x.shape[1], indices.numel()
    weight, bias = x.new_zeros(n_latents, d), x.new_zeros(n_latents, dtype=torch.float32)
    if n_latents == 0 or entries == 0:
        return weight, bias
    keys, order = sorted_entries(coefficients, indices, n_latents)
    latents, row_ids = torch.empty(2, entries, dtype=torch.int32, device=x.device)
    sorted_coefficients = x.new_empty(entries, dtype=torch.float32)
    length = 4 * -(-max(SEGMENT, -(-2 * entries * 4 * d // PARTIAL_BYTES)) // 4)  # a program takes four at a time
    segments = -(-entries // length)
    partial, partial_bias = (x.new_empty(2 * segments * size, dtype=torch.float32) for size in (d, 1))
    block_d = min(next_power_of_2(max(d, 16)), 256)  # of one warp, whose threads need nothing of each other
    columns = max(1, -(-d // block_d))
    with torch.cuda.device_of(x):
        _weight_gradient_entries_kernel[(-(-entries // 1024),)](
            keys, order, coefficients, latents, row_ids, sorted_coefficients, entries, indices.shape[1],
            *coefficients.stride(), BLOCK_ENTRIES=1024, num_warps=4,
        )  # fmt: skip
        _weight_gradient_segment_kernel[(segments, columns)](
            latents, row_ids, sorted_coefficients, x, shift, weight, bias, partial, partial_bias, entries, n_latents, d,
            length, *x.stride(), *shift.stride(), BLOCK_D=block_d, num_warps=1,
        )  # fmt: skip
        if segments > 1:
            _weight_gradient_join_kernel[(segments - 1, columns)](
                latents, weight, bias, partial, partial_bias, entries, n_latents, d, length, BLOCK_D=block_d, num_warps=1,
            )  # fmt: skip
    return weight, bias


# ------------------------------------------------------------------------------------------------------- registration


def check_gradient(x: Tensor, shift: Tensor, rows: int, n_latents: int) -> None:
    """Refuse what is not the other factor of a code of so many rows."""
    if x.dim() != 2 or x.shape[0] != rows:
        raise ValueError(f"x must be [{rows}, d] as the code has {rows} rows, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if tuple(shift.shape) != (x.shape[1],):
        raise ValueError(f"shift must have shape ({x.shape[1]},), got {tuple(shift.shape)}")
    if shift.device != x.device:
        raise ValueError(f"shift must be on x's device {x.device}, got {shift.device}; move one of them")
    if n_latents < 0:
        raise ValueError(f"n_latents must be at least 0, got {n_latents}")


def _weight_gradient(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    check_code(coefficients, indices, x.device, "x", "coefficients")
    check_gradient(x, shift, len(coefficients), n_latents)
    if implementation("weight_gradient", x) == "triton":
        return _weight_gradient_triton(coefficients, indices, x, shift, n_latents)
    return weight_gradient_cpu(coefficients, indices, x, shift, n_latents)


def _weight_gradient_fake(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(n_latents, x.shape[1]), x.new_empty(n_latents, dtype=sum_dtype(x))


register(
    "weight_gradient",
    "(Tensor coefficients, Tensor indices, Tensor x, Tensor shift, SymInt n_latents) -> (Tensor, Tensor)",
    _weight_gradient,
    fake=_weight_gradient_fake,
)
