"""sparse_decode: sums of a few decoder rows, and the gradient that goes back to the code."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..code import check_code, check_indices
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
from ..gradient.weight_gradient import weight_gradient
from ..products import pair_products, quiet_about_csr
from ..threads import conducted, each, pieces, threads, together
from ..tuning_table import tuned

__all__ = [
    "check_decode",
    "grad_values_cpu",
    "sparse_decode",
    "sparse_decode_cpu",
    "sparse_decode_triton",
]

# A bound on the decoder rows gathered at a time on the CPU path: they stay in a core's L2.
GATHER_BYTES = 1 << 20
RESULT_BYTES = 1 << 18  # and of the result, where several threads share it


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor, validate: bool = False) -> Tensor:
    """The reconstruction of a padded code.

        y[r] = b_out + sum over j of values[r, j] * W_dec[indices[r, j]]

    Args:
        values: [rows, k] floating, usually float32; indices: [rows, k] int32 or int64.
        W_dec: [n_latents, d], float32, float64, bfloat16 or float16; b_out: [d] in W_dec's dtype.
        validate: raise if an index is outside 0 .. n_latents - 1 (reads the indices back from the device). Without it
            such an entry is skipped, and never dereferenced.

    Returns:
        [rows, d] in W_dec's dtype, summed in fp32 (fp64 for float64) in the order of the entries and rounded once.
        Entries of value 0 are skipped, so that padding may point anywhere, even at a latent with NaN weights.

    Gradients: values (gather of dot products; 0 where a value is 0), W_dec and b_out; the same bits on every run.

    Cost: 2 rows k d FLOPs; reads rows k d values of W_dec (from the cache where W_dec fits), writes rows d. The
    gathered rows are never held: scratch is some MiB whatever rows is.

    Raises: ValueError or TypeError naming the argument; IndexError under `validate`.

    Example:
        >>> W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
        >>> sparse_decode(torch.tensor([[2.0, 3.0]]), torch.tensor([[0, 1]]).int(), W_dec, torch.tensor([0.5, 0.5]))
        tensor([[2.5000, 3.5000]])
    """
    if validate:
        check_indices(indices, W_dec.shape[0])
    return ops.sparse_decode(values, indices, W_dec, b_out)


def _no_zero(values: Tensor) -> bool:
    """The smallest value tells of most codes, in a quarter of the time that `all` takes."""
    return float(values.amin()) > 0 or bool(values.all())


def reference(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor) -> Tensor:
    """The meaning of sparse_decode: dense, any dtype."""
    z = values.new_zeros(values.shape[0], W_dec.shape[0]).scatter_add(1, indices.long(), values)
    return z @ W_dec + b_out


def check_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor) -> None:
    check_code(values, indices, W_dec.device, "W_dec")
    if W_dec.dim() != 2:
        raise ValueError(f"W_dec must be [n_latents, d], got shape {tuple(W_dec.shape)}")
    if W_dec.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"W_dec must be float32, float64, bfloat16 or float16, got {W_dec.dtype}")
    if b_out.shape != W_dec.shape[1:]:
        raise ValueError(f"b_out must have shape ({W_dec.shape[1]},), got {tuple(b_out.shape)}")
    if b_out.dtype != W_dec.dtype:
        raise TypeError(f"b_out must have W_dec's dtype {W_dec.dtype}, got {b_out.dtype}; cast one of them")
    if b_out.device != W_dec.device:
        raise ValueError(f"b_out must be on W_dec's device {W_dec.device}, got {b_out.device}; move one of them")


# --------------------------------------------------------------------------------------------------------------- CPU


def _owned_entries(values: Tensor, indices: Tensor, n_latents: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The code with every entry that must not be read (value 0, index out of range) as value 0 at index 0."""
    owned = (values != 0) & (indices >= 0) & (indices < n_latents)
    return torch.where(owned, values, 0).to(dtype), torch.where(owned, indices, 0)


def sparse_decode_cpu(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor) -> Tensor:
    dtype = sum_dtype(W_dec)
    if values.numel() == 0 or W_dec.numel() == 0:
        return b_out.repeat(values.shape[0], 1)
    bags = W_dec.dtype == dtype and W_dec.device.type == "cpu"  # on a GPU the host would wait to learn what is padding
    if bags and values.dtype == dtype and _no_zero(values):
        # One op, one parallel region: in pieces it takes twice as long (7.5 ms against 3.6 at 1,024 rows, d = 1,280, k = 32).
        # Without F.embedding_bag's own checks, which take as long as ours. It refuses an index that is out of range itself.
        first = torch.arange(0, values.numel(), values.shape[1], dtype=indices.dtype)
        with contextlib.suppress(RuntimeError):
            bag = torch.embedding_bag(W_dec, indices.reshape(-1), first, per_sample_weights=values.reshape(-1))
            return bag[0].add_(b_out)
    return _decode_padded(values, indices, W_dec, b_out, bags)


@conducted
def _decode_padded(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor, bags: bool) -> Tensor:
    rows, k = values.shape
    (n_latents, d), dtype = W_dec.shape, sum_dtype(W_dec)
    y = W_dec.new_empty(rows, d)
    clean, indices = _owned_entries(values, indices, n_latents, dtype)
    used = clean != 0
    wide_b_out = b_out.to(dtype)

    def some(block: slice) -> None:
        of_block, at = clean[block], indices[block]
        if bags:  # without the padding
            kept = used[block]
            offsets = torch.zeros(len(kept) + 1, dtype=at.dtype, device=at.device)
            offsets[1:] = kept.sum(1).cumsum(0)
            if int(offsets[-1]) == 0:
                y[block] = b_out
                return
            out = torch.nn.functional.embedding_bag(
                at[kept], W_dec, offsets, per_sample_weights=of_block[kept], mode="sum", include_last_offset=True
            )
        else:  # embedding_bag would round the values to half precision: gather a few rows at a time and widen them
            gathered = W_dec[at].to(dtype)  # [block, k, d]
            gathered.masked_fill_(~used[block, :, None], 0)
            out = (of_block[:, None] @ gathered)[:, 0]
        torch.add(out, wide_b_out, out=y[block])

    if not bags:
        together(each(some, row_chunks(rows, k * d * dtype.itemsize, block_bytes(W_dec, GATHER_BYTES))))
    elif threads() > 1:
        together(each(some, row_chunks(rows, d * dtype.itemsize, RESULT_BYTES)))
    else:
        some(slice(0, rows))
    return y


@conducted
def grad_values_cpu(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    (rows, k), dtype = values.shape, sum_dtype(W_dec)
    clean, at = _owned_entries(values, indices, W_dec.shape[0], dtype)
    out = torch.zeros_like(values, memory_format=torch.contiguous_format)
    if values.numel() == 0 or W_dec.numel() == 0:
        return out
    if W_dec.dtype == dtype and W_dec.is_contiguous() and W_dec.device.type == "cpu":
        quiet_about_csr()

        def some(block: slice) -> None:
            used = clean[block] != 0
            offsets = torch.nn.functional.pad(used.sum(1).cumsum(0), (1, 0))
            dots = pair_products(grad[block].to(dtype), W_dec, offsets, at[block][used].long())
            out[block] = out[block].masked_scatter(used, dots.to(out.dtype))

        together(each(some, pieces(rows)))
        return out

    def few(block: slice) -> None:
        dots = (W_dec[at[block]].to(dtype) @ grad[block, :, None].to(dtype))[:, :, 0]  # [block, k]
        out[block] = torch.where(clean[block] != 0, dots, 0).to(out.dtype)

    together(each(few, row_chunks(rows, k * W_dec.shape[1] * dtype.itemsize, block_bytes(W_dec, GATHER_BYTES))))
    return out


# ------------------------------------------------------------------------------------------------------------ Triton

DEFAULT_BLOCKS = {"BLOCK_K": 4, "BLOCK_D": 512, "num_warps": 4}  # without a tuning table: 128 threads times 4 columns


@jit_over_rows
def _sparse_decode_sum_kernel(
    values_ptr,
    indices_ptr,
    W_ptr,
    b_out_ptr,
    y_ptr,
    n_latents,
    k,
    d,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    stride_W_latent,
    stride_W_d,
    stride_b_out_d,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row and one block of columns: BLOCK_K partial sums of decoder rows, one final tree."""
    row = tl.program_id(0).to(tl.int64)
    # int64 before it is multiplied: a transposed dictionary of 2^31 elements has them between its columns.
    column = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K).to(tl.int64)
        value = tl.load(values_ptr + row * stride_values_row + entry * stride_values_k, mask=entry < k, other=0.0)
        index = tl.load(indices_ptr + row * stride_indices_row + entry * stride_indices_k, mask=entry < k, other=0)
        owned = (value != 0.0) & (index >= 0) & (index < n_latents)  # NaN != 0: it is summed
        W_ptrs = W_ptr + index.to(tl.int64)[:, None] * stride_W_latent + column[None, :] * stride_W_d
        w = tl.load(W_ptrs, mask=owned[:, None] & (column < d)[None, :], other=0.0)  # [BLOCK_K, BLOCK_D]
        total += tl.where(owned, value.to(tl.float32), 0.0)[:, None] * w.to(tl.float32)
    bias = tl.load(b_out_ptr + column * stride_b_out_d, mask=column < d, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * d + column, tl.sum(total, axis=0) + bias, mask=column < d)


@jit_over_rows
def _sparse_decode_grad_values_kernel(
    grad_ptr,
    values_ptr,
    indices_ptr,
    W_ptr,
    out_ptr,
    n_latents,
    k,
    d,
    stride_grad_row,
    stride_grad_d,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    stride_W_latent,
    stride_W_d,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row and BLOCK_K of its entries: dot products of the row's gradient with decoder rows."""
    blocks = tl.cdiv(k, BLOCK_K)  # in the grid's first dimension, which alone may be longer than 65,535
    row = (tl.program_id(0) // blocks).to(tl.int64)
    entry = ((tl.program_id(0) % blocks) * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    value = tl.load(values_ptr + row * stride_values_row + entry * stride_values_k, mask=entry < k, other=0.0)
    index = tl.load(indices_ptr + row * stride_indices_row + entry * stride_indices_k, mask=entry < k, other=0)
    owned = (value != 0.0) & (index >= 0) & (index < n_latents)
    W_ptr += index.to(tl.int64)[:, None] * stride_W_latent  # [BLOCK_K, 1]
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D).to(tl.int64)
        w = tl.load(W_ptr + column[None, :] * stride_W_d, mask=owned[:, None] & (column < d)[None, :], other=0.0)
        grad = tl.load(grad_ptr + row * stride_grad_row + column * stride_grad_d, mask=column < d, other=0.0)
        total += w.to(tl.float32) * grad.to(tl.float32)[None, :]  # [BLOCK_K, BLOCK_D]
    tl.store(out_ptr + row * k + entry, tl.where(owned, tl.sum(total, axis=1), 0.0), mask=entry < k)


def sparse_decode_triton(
    values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor, blocks: Mapping[str, int] | None = None
) -> Tensor:
    """`blocks`: sizes and warps, of a tuning table."""
    (rows, k), (n_latents, d) = values.shape, W_dec.shape
    y = W_dec.new_empty(rows, d)
    if y.numel() == 0:
        return y
    blocks = DEFAULT_BLOCKS if blocks is None else blocks
    block_d = min(next_power_of_2(max(d, 16)), blocks["BLOCK_D"])
    with torch.cuda.device_of(W_dec):
        _sparse_decode_sum_kernel[(rows, -(-d // block_d))](
            values, indices, W_dec, b_out, y, n_latents, k, d, *values.stride(), *indices.stride(), *W_dec.stride(),
            *b_out.stride(), **{**blocks, "BLOCK_D": block_d},
        )  # fmt: skip
    return y


def _grad_values_triton(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    (rows, k), (n_latents, d) = values.shape, W_dec.shape
    out = torch.empty_like(values, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    block_k, block_d = 8, min(next_power_of_2(max(d, 16)), 256)
    with torch.cuda.device_of(W_dec):
        _sparse_decode_grad_values_kernel[(rows * -(-k // block_k),)](
            grad, values, indices, W_dec, out, n_latents, k, d, *grad.stride(), *values.stride(), *indices.stride(),
            *W_dec.stride(), BLOCK_K=block_k, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


# ------------------------------------------------------------------------------------------------------- registration


def _sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor) -> Tensor:
    check_decode(values, indices, W_dec, b_out)
    if implementation("sparse_decode", W_dec) == "triton":
        entry = tuned("sparse_decode", W_dec, *values.shape)
        return sparse_decode_triton(values, indices, W_dec, b_out, None if entry is None else entry.blocks)
    return sparse_decode_cpu(values, indices, W_dec, b_out)


def _sparse_decode_fake(values: Tensor, indices: Tensor, W_dec: Tensor, b_out: Tensor) -> Tensor:
    check_decode(values, indices, W_dec, b_out)
    return W_dec.new_empty(values.shape[0], W_dec.shape[1])


def _grad_values(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    if implementation("sparse_decode", W_dec) == "triton":
        return _grad_values_triton(grad, values, indices, W_dec)
    return grad_values_cpu(grad, values, indices, W_dec)


def _grad_values_fake(grad: Tensor, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, W_dec, _ = inputs
    ctx.save_for_backward(values, indices, W_dec)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, W_dec = ctx.saved_tensors
    need_values, _, need_W, need_b = ctx.needs_input_grad
    grad_values = ops.sparse_decode_grad_values(grad, values, indices, W_dec) if need_values else None
    grad_W = (
        weight_gradient(values, indices, grad, grad.new_zeros(grad.shape[1]), W_dec.shape[0])[0] if need_W else None
    )
    return grad_values, None, grad_W, grad.sum(0) if need_b else None


register(
    "sparse_decode",
    "(Tensor values, Tensor indices, Tensor W_dec, Tensor b_out) -> Tensor",
    _sparse_decode,
    fake=_sparse_decode_fake,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "sparse_decode_grad_values",
    "(Tensor grad, Tensor values, Tensor indices, Tensor W_dec) -> Tensor",
    _grad_values,
    fake=_grad_values_fake,
)
