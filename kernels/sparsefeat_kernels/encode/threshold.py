"""threshold_encode and threshold_encode_csr: every pre-activation above a threshold, without the [rows, n_latents] tensor.

What JumpReLU, ReLU and BatchTopK with a stored threshold compute. Nothing is selected, so after the product there is
only the compaction of what is active, in index order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, ops, register, replayed, sum_dtype
from ..gradient.weight_gradient import weight_gradient
from .gpu.threshold import threshold_encode_csr_triton, threshold_encode_triton
from .prepared import PreparedEncoder
from .product import check_bias, check_encoder
from .threshold_cpu import threshold_encode_cpu, threshold_encode_csr_cpu

__all__ = ["threshold_encode", "threshold_encode_csr"]

PADDED_ENTRIES = 1 << 20  # entries of a CSR code that its gradient pads at a time, some 40 bytes each


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    threshold: Tensor,
    max_active: int,
    *,
    prepared: PreparedEncoder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above a threshold, padded to `max_active` a row, and how many there were.

        a[r, i] = (x[r] - b_pre) . W_enc[i] + b_enc[i]
        latent i is active in row r where a[r, i] > max(threshold[i], 0); its value is a[r, i]

    A threshold of 0 is a plain ReLU; a negative one is the same, since values are positive always.

    Args:
        x: [rows, d], float32, float64, bfloat16 or float16; rows may be 0, strides are free.
        W_enc: [n_latents, d]; b_enc: [n_latents]; b_pre: [d]; dtype and device of x.
        threshold: a scalar tensor or [n_latents], any floating dtype; compared in the dtype of the sum. A latent whose
            threshold is NaN or infinite is never active.
        max_active: entries a row is given, 1 <= max_active <= n_latents.
        prepared: of `prepare_encoder(W_enc, b_enc, b_pre)`: saves a GPU's kernels in half precision a pass over W_enc.
            Elsewhere it is passed over.

    Returns:
        values [rows, max_active], float64 for float64 inputs and float32 for all others; indices [rows, max_active]
        int32; counts [rows] int32, the true number of active latents. Entries are in order of their index; the rest of
        a row is value 0 at index 0. A row overflows where counts > max_active: it then holds its max_active lowest
        active indices, whatever the values, and counts is still exact. A row in which any a is NaN has max_active NaN
        values, the indices 0 .. max_active - 1 and count 1. An a of +inf is active.

    Precision: sums as in topk_encode, IEEE fp32 (fp64 for float64 inputs), and on a GPU with the same limits: a part of an
    fp32 product below 1.2e-38 may count as 0, and a number beyond bf16's largest as infinite. A latent whose a is nearer to the threshold
    than the rounding of its sum may fall on either side. The same bits on every run of the same build, path and shape.

    Gradients reach x, W_enc, b_enc and b_pre through the entries whose value is not 0, without float atomics; not the
    threshold. The host never waits for the device (float64 on a GPU, which takes the CPU path, does).

    Cost: 2 rows n_latents d FLOPs; reads W_enc once a chunk of rows (of 4,096 and more by a GPU's kernels). Scratch stays below 64 MiB whatever rows is (as
    long as one row does, 80 n_latents bytes). On a CPU with bf16 instructions a bf16 product proves most latents
    inactive and only the others are computed in fp32: 0.4 of the fp32 product's time for 100 active of 20,480, as much
    as without where more than some 4 % are active.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices or max_active.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0), max_active=3)
        (tensor([[2., 3., 0.]]), tensor([[0, 2, 0]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return ops.threshold_encode(
        x, W_enc, b_enc, b_pre, threshold, max_active, _kept_bias(prepared, W_enc, b_enc, b_pre)
    )


def threshold_encode_csr(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    threshold: Tensor,
    *,
    prepared: PreparedEncoder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold, as a code of rows of different lengths. The host waits for the device.

    The same entries in the same order as threshold_encode's, without a limit: row r owns the entries
    row_offsets[r] .. row_offsets[r + 1] - 1. A row in which any a is NaN has one entry, NaN at index 0.

    Args: as threshold_encode's, without max_active.

    Returns: values [entries]; indices [entries] int32; row_offsets [rows + 1] int64. `entries` depends on the data: the
    host reads it once a chunk of rows.

    Gradients, precision, cost and errors are threshold_encode's; on a CPU at most 72 MiB of the code are held twice, on a
    GPU all of it while its chunks are joined.
    The gradient pads some rows at a time (the host waits once for the lengths) and, with half-precision inputs that
    take several such blocks, sums in a float32 copy of the block's inputs and of the weight gradient.

    Example:
        >>> x = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode_csr(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0))
        (tensor([2., 3., 2.]), tensor([0, 2, 1], dtype=torch.int32), tensor([0, 2, 3]))
    """
    return ops.threshold_encode_csr(x, W_enc, b_enc, b_pre, threshold, _kept_bias(prepared, W_enc, b_enc, b_pre))


def _kept_bias(prepared: PreparedEncoder | None, *weights: Tensor) -> Tensor | None:
    if prepared is None:
        return None
    prepared.check_current(*weights)
    return prepared.bias


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of threshold_encode: dense, any dtype."""
    a = (x - b_pre) @ W_enc.T + b_enc
    active = (a > threshold.to(a.dtype)) & (a > 0)
    order = (~active).sort(dim=1, stable=True).indices[:, :max_active]  # active ones first, each kind by index
    values = torch.where(active, a, 0).gather(1, order)
    indices = torch.where(values != 0, order, 0)
    broken = a.isnan().any(dim=1)
    values = torch.where(broken[:, None], torch.nan, values)
    indices = torch.where(broken[:, None], torch.arange(max_active, device=x.device), indices)
    return values, indices.to(torch.int32), torch.where(broken, 1, active.sum(1)).to(torch.int32)


def _check(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None, most: int = 1
) -> None:
    if W_enc.dim() == 2 and W_enc.shape[0] == 0:
        raise ValueError(f"W_enc must have at least one latent, got shape {tuple(W_enc.shape)}")
    check_encoder(x, W_enc, b_enc, b_pre, 1, "raw")
    check_bias(bias, W_enc)
    n_latents = W_enc.shape[0]
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != n_latents):
        raise ValueError(
            f"threshold must be a scalar tensor or have shape ({n_latents},), got {tuple(threshold.shape)}"
        )
    if not threshold.is_floating_point():
        raise TypeError(f"threshold must be floating point, got {threshold.dtype}; convert it with .float()")
    if threshold.device != x.device:
        raise ValueError(f"threshold must be on x's device {x.device}, got {threshold.device}; move one of them")
    if not 1 <= most <= n_latents:
        raise ValueError(f"max_active must be between 1 and n_latents = {n_latents}, got {most}")


# ---------------------------------------------------------------------------------------------- gradient of a CSR code
# Both gradients pad blocks of rows and hand them to the ops for padded codes. A block's width is that of its own fullest
# row, so that one crowded row widens one block only. Blocks are summed in order.


def _blocks_of_rows(row_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, width) of blocks of at most PADDED_ENTRIES places, or of one row."""
    blocks, first, width = [], 0, 0
    lengths = row_offsets.diff().tolist()
    for row, length in enumerate(lengths):
        if row > first and (row + 1 - first) * max(width, length) > PADDED_ENTRIES:
            blocks.append((first, row, width))
            first, width = row, 0
        width = max(width, length)
    return [*blocks, (first, len(lengths), width)] if lengths else []


def _padded(values: Tensor, indices: Tensor, row_offsets: Tensor, block: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The rows of a block as a padded code."""
    first, last, width = block
    position = row_offsets[first:last, None] + torch.arange(width, device=values.device)  # [last - first, width]
    inside = position < row_offsets[first + 1 : last + 1, None]
    position = torch.where(inside, position, 0)
    return torch.where(inside, values[position], 0), indices[position]


def _csr_grad_x(grad_values: Tensor, indices: Tensor, row_offsets: Tensor, W_enc: Tensor) -> Tensor:
    grad_x = W_enc.new_zeros(row_offsets.shape[0] - 1, W_enc.shape[1])
    for block in _blocks_of_rows(row_offsets):
        padded = _padded(grad_values, indices, row_offsets, block)
        grad_x[block[0] : block[1]] = ops.sparse_decode(*padded, W_enc, W_enc.new_zeros(W_enc.shape[1]))
    return grad_x


def _csr_grad_weights(
    grad_values: Tensor, indices: Tensor, row_offsets: Tensor, x: Tensor, b_pre: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    blocks, dtype = _blocks_of_rows(row_offsets), sum_dtype(x)
    if len(blocks) == 1:
        return weight_gradient(*_padded(grad_values, indices, row_offsets, blocks[0]), x, b_pre, n_latents)
    weight = x.new_zeros(n_latents, x.shape[1], dtype=dtype)
    bias = x.new_zeros(n_latents, dtype=dtype)
    for block in blocks:
        padded = _padded(grad_values, indices, row_offsets, block)
        more_weight, more_bias = weight_gradient(*padded, x[block[0] : block[1]].to(dtype), b_pre.to(dtype), n_latents)
        weight += more_weight
        bias += more_bias
    return weight.to(x.dtype), bias


# ------------------------------------------------------------------------------------------------------- registration


_by_kernels = replayed(threshold_encode_triton)


def _threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    threshold: Tensor,
    max_active: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, bias, max_active)
    if implementation("threshold_encode", x) == "triton":
        return _by_kernels(x, W_enc, b_enc, b_pre, threshold.to(torch.float32), max_active, bias)
    return threshold_encode_cpu(x, W_enc, b_enc, b_pre, threshold, max_active)


def _threshold_encode_fake(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    threshold: Tensor,
    max_active: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, bias, max_active)
    shape = (x.shape[0], max_active)
    return (
        x.new_empty(shape, dtype=sum_dtype(x)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(x.shape[0], dtype=torch.int32),
    )


def _threshold_encode_csr(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, bias)
    if implementation("threshold_encode", x) == "triton":
        return threshold_encode_csr_triton(x, W_enc, b_enc, b_pre, threshold, bias)
    return threshold_encode_csr_cpu(x, W_enc, b_enc, b_pre, threshold)


def _threshold_encode_csr_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, bias)
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(entries, dtype=sum_dtype(x)),
        x.new_empty(entries, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


def _weight_gradients(ctx: Any, weight: Tensor, bias: Tensor, W_enc: Tensor) -> list[Tensor | None]:
    """The gradients of W_enc, b_enc and b_pre from z^T (x - b_pre) and the column sums of z, the gradient of the code:
    that of b_pre is -(column sums of z) W_enc."""
    _, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    sums = bias.to(W_enc.dtype)
    with torch.autocast(W_enc.device.type, enabled=False):
        return [weight if need_W else None, sums if need_b_enc else None, -(sums @ W_enc) if need_b_pre else None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre = inputs[:4]
    values, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, W_enc, b_pre, values, indices)


def _backward(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, values, indices = ctx.saved_tensors
    g = torch.where(values != 0, grad_values, 0)
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = ops.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = weight_gradient(g, indices, x, b_pre, W_enc.shape[0])
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None, None, None


def _setup_context_csr(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre = inputs[:4]
    _, indices, row_offsets = output
    ctx.mark_non_differentiable(indices, row_offsets)
    ctx.save_for_backward(x, W_enc, b_pre, indices, row_offsets)


def _backward_csr(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, indices, row_offsets = ctx.saved_tensors
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = ops.threshold_encode_csr_grad_x(grad_values, indices, row_offsets, W_enc)
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = ops.threshold_encode_csr_grad_weights(
            grad_values, indices, row_offsets, x, b_pre, W_enc.shape[0]
        )
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None, None


register(
    "threshold_encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold, SymInt max_active, "
    "Tensor? bias=None) -> (Tensor, Tensor, Tensor)",
    _threshold_encode,
    fake=_threshold_encode_fake,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "threshold_encode_csr",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold, Tensor? bias=None) "
    "-> (Tensor, Tensor, Tensor)",
    _threshold_encode_csr,
    fake=_threshold_encode_csr_fake,
    backward=_backward_csr,
    setup_context=_setup_context_csr,
)

register(
    "threshold_encode_csr_grad_x",
    "(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor W_enc) -> Tensor",
    _csr_grad_x,
    fake=lambda grad_values, indices, row_offsets, W_enc: W_enc.new_empty(row_offsets.shape[0] - 1, W_enc.shape[1]),
)

register(
    "threshold_encode_csr_grad_weights",
    "(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor x, Tensor b_pre, SymInt n_latents) "
    "-> (Tensor, Tensor)",
    _csr_grad_weights,
    fake=lambda grad_values, indices, row_offsets, x, b_pre, n_latents: (
        x.new_empty(n_latents, x.shape[1]),
        x.new_empty(n_latents, dtype=sum_dtype(x)),
    ),
)
