"""weight_gradient: what both gradients of weights are, summed latent by latent over the latent-major view of a code."""

from __future__ import annotations

import torch
from torch import Tensor

from ..code import check_code
from ..dispatch import (
    block_bytes,
    implementation,
    jit_over_rows,
    next_power_of_2,
    ops,
    register,
    row_chunks,
    sum_dtype,
    tl,
)
from ..threads import conducted, each, together
from .csr import latent_major
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
    the sorted code; on a GPU 16 MiB of partial sums and the sorted code.

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


# A latent that fires on most rows would keep one program busy long after all others are done, so no program takes more
# than a segment of a latent's entries. Each latent has a program for its first segment, whose sum is the result of most; the
# further segments have programs of their own, and a latent that has such leaves partial sums, which a second kernel adds in
# order. Nothing waits for the device.

SEGMENT = 512  # entries: 128 steps of 4
PARTIAL_BYTES = 16 << 20  # a bound on the partial sums; beyond it segments are longer


@jit_over_rows
def _weight_gradient_segment_kernel(
    coefficients_ptr,
    x_ptr,
    shift_ptr,
    row_ids_ptr,
    order_ptr,
    latent_offsets_ptr,
    further_ptr,
    latent_of_further_ptr,
    weight_ptr,
    bias_ptr,
    partial_ptr,
    partial_bias_ptr,
    n_latents,
    d,
    segment_length,
    stride_x_row,
    stride_x_d,
    stride_shift_d,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One segment and one block of columns: its entries in row order, BLOCK_ENTRIES partial sums, one final tree."""
    program = tl.program_id(0).to(tl.int64)
    further = program - n_latents  # the number of a further segment, or negative: a latent's first
    latent = program
    if further >= 0:
        latent = tl.load(latent_of_further_ptr + further)
    exists = latent < n_latents
    begin = tl.load(latent_offsets_ptr + latent, mask=exists, other=0)
    end = tl.load(latent_offsets_ptr + latent + 1, mask=exists, other=0)
    of_latent = tl.load(further_ptr + latent, mask=exists, other=0)  # the number of its first further segment
    alone = end - begin <= segment_length
    place = tl.where(further >= 0, further, tl.num_programs(0) - n_latents + of_latent)
    first = begin + tl.where(further >= 0, further - of_latent + 1, 0) * segment_length
    last = tl.minimum(first + segment_length, end)
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    shift = tl.load(shift_ptr + column * stride_shift_d, mask=column < d, other=0.0).to(tl.float32)  # [BLOCK_D]
    total = tl.zeros([BLOCK_ENTRIES, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_ENTRIES], tl.float32)
    for start in range(first, last, BLOCK_ENTRIES):
        entry = start + tl.arange(0, BLOCK_ENTRIES)
        inside = entry < last
        row = tl.load(row_ids_ptr + entry, mask=inside, other=0)
        position = tl.load(order_ptr + entry, mask=inside, other=0)
        coefficient = tl.load(coefficients_ptr + position, mask=inside, other=0.0).to(tl.float32)
        x_ptrs = x_ptr + row[:, None] * stride_x_row + column[None, :] * stride_x_d
        read = inside[:, None] & (column < d)[None, :]
        x = tl.load(x_ptrs, mask=read, other=0.0).to(tl.float32)  # [BLOCK_ENTRIES, BLOCK_D]
        total += coefficient[:, None] * (x - shift[None, :])
        bias += coefficient
    total_of_segment, bias_of_segment = tl.sum(total, axis=0), tl.sum(bias, axis=0)
    tl.store(weight_ptr + latent * d + column, total_of_segment, mask=(column < d) & exists & alone)
    tl.store(partial_ptr + place * d + column, total_of_segment, mask=(column < d) & exists & (not alone))
    of_bias = exists & (tl.program_id(1) == 0)
    tl.store(bias_ptr + latent, bias_of_segment, mask=of_bias & alone)
    tl.store(partial_bias_ptr + place, bias_of_segment, mask=of_bias & (not alone))


@jit_over_rows
def _weight_gradient_partial_kernel(
    further_ptr,
    latent_of_further_ptr,
    partial_ptr,
    partial_bias_ptr,
    weight_ptr,
    bias_ptr,
    n_latents,
    d,
    BLOCK_D: tl.constexpr,
):
    """One further segment and one block of columns. Where it is its latent's first, the sum of the latent's partial sums, in
    their order."""
    further = tl.program_id(0).to(tl.int64)
    latent = tl.load(latent_of_further_ptr + further)
    exists = latent < n_latents
    first = tl.load(further_ptr + latent, mask=exists, other=-1)
    last = tl.load(further_ptr + latent + 1, mask=exists, other=0)
    if first == further:
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        place = tl.num_programs(0) + first  # of the latent's first segment
        total = tl.load(partial_ptr + place * d + column, mask=column < d, other=0.0)  # [BLOCK_D]
        bias = tl.load(partial_bias_ptr + place)
        for place in range(first, last):
            total += tl.load(partial_ptr + place * d + column, mask=column < d, other=0.0)
            bias += tl.load(partial_bias_ptr + place)
        tl.store(weight_ptr + latent * d + column, total, mask=column < d)
        tl.store(bias_ptr + latent, bias, mask=tl.program_id(1) == 0)


def _weight_gradient_triton(
    coefficients: Tensor, indices: Tensor, x: Tensor, shift: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    d, entries = x.shape[1], indices.numel()
    weight, bias = x.new_empty(n_latents, d), x.new_empty(n_latents, dtype=torch.float32)
    if n_latents == 0:
        return weight, bias
    row_ids, order, offsets = latent_major(indices, coefficients, n_latents)
    length = max(SEGMENT, -(-2 * entries * 4 * d // PARTIAL_BYTES))
    most = entries // length  # further segments: at most so many latents have any, and none but its last is short
    further = offsets.new_zeros(n_latents + 1)
    torch.cumsum(((offsets.diff() - 1) // length).clamp_(min=0), 0, out=further[1:])
    latent_of_further = torch.searchsorted(further[1:], torch.arange(most, device=x.device), right=True)
    partial = x.new_empty(2 * most, d, dtype=torch.float32)  # further ones, and first ones of latents that have such
    partial_bias = x.new_empty(2 * most, dtype=torch.float32)
    block_d = min(next_power_of_2(max(d, 16)), 512)  # 128 threads times 4 columns
    columns = max(1, -(-d // block_d))
    with torch.cuda.device_of(x):
        _weight_gradient_segment_kernel[(n_latents + most, columns)](
            coefficients.contiguous(), x, shift, row_ids, order, offsets, further, latent_of_further, weight, bias,
            partial, partial_bias, n_latents, d, length, *x.stride(), *shift.stride(), BLOCK_ENTRIES=4, BLOCK_D=block_d,
            num_warps=4,
        )  # fmt: skip
        if most:
            _weight_gradient_partial_kernel[(most, columns)](
                further, latent_of_further, partial, partial_bias, weight, bias, n_latents, d, BLOCK_D=block_d,
                num_warps=4,
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
