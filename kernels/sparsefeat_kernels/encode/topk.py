"""topk_encode: the exact k largest pre-activations of a sparse autoencoder, without the [rows, n_latents] tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import ops, register, sum_dtype
from ..gradient.weight_gradient import weight_gradient
from ..tuning_table import tuned
from .cpu import topk_encode_cpu
from .gpu.stored import topk_stored
from .gpu.topk import Way, topk_encode_triton, way
from .prepared import PreparedEncoder
from .product import SELECTIONS, check_bias, check_encoder, encoder_bias
from .rounded import BIAS_COLUMNS, can_prefilter, pays_to_round, rounded_width
from .survivors import topk_prefiltered_cpu

__all__ = ["SELECTIONS", "pre_bias_gradient", "through", "topk_by_kernels", "topk_encode"]


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str = "relu",
    *,
    prepared: PreparedEncoder | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of every row, exactly, and the latents they belong to.

        a[r, i] = (x[r] - b_pre) . W_enc[i] + b_enc[i]
        relu:    the k largest a; values max(a, 0). Where fewer than k are positive, the rest of the row holds value 0
                 with the indices of the largest a that are not positive: the selection is made before the ReLU.
        raw:     the k largest a; values a.
        signed:  the k largest |a|; values a.

    Args:
        x: [rows, d], float32, float64, bfloat16 or float16; rows may be 0, strides are free.
        W_enc: [n_latents, d]; b_enc: [n_latents]; b_pre: [d]; dtype and device of x.
        k: 1 <= k <= n_latents.
        selection: "relu", "raw" or "signed".
        prepared: of `prepare_encoder(W_enc, b_enc)`: float32 rows on a CPU with bf16 instructions then go through a
            bf16 product that narrows the search, with a proof for every row. The same contract, in a third of the time
            that the float32 product alone takes; which path a row took shows nowhere but in the last bits. Elsewhere it
            is passed over, but by a GPU's kernels in half precision: what was prepared with b_pre saves them a pass over
            W_enc. Without it the weights are rounded anew by every call large enough to gain by it (of 16 rows
            and more at 20,480 x 1,280; half-precision inputs too): some 0.4 of the product's time at 1,024 rows.

    Returns:
        values [rows, k], float64 for float64 inputs and float32 for all others (the sum is never rounded to half
        precision); indices [rows, k] int32. Sorted by value, largest first (signed: by magnitude); equal values,
        -0.0 and +0.0 among them, by index. Where several latents tie for the last place, the lowest index is in.
        A row in which any a is NaN has k NaN values and the indices 0 .. k - 1. Infinities are ordered like numbers.

    Precision: sums are held in fp32 (fp64 for float64 inputs); fp32 products are IEEE, or (a GPU's kernels) six products
    of bf16 parts, which are within an IEEE sum's bound, never TF32. Of a GPU's fp32 products a part below 1.2e-38 may
    count as 0, and a number beyond bf16's largest, 3.39e38, as infinite. Gradients reach x, W_enc, b_enc and b_pre through the entries whose value is not 0, without float atomics: the same bits every run.

    Cost: 2 rows n_latents d FLOPs; reads W_enc once a chunk of rows. Never holds [rows, n_latents]: scratch stays
    below 64 MiB whatever rows is (as long as one row of pre-activations, 4 n_latents bytes, does too).

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices, k or selection.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> topk_encode(x, W_enc, torch.zeros(4), torch.zeros(2), k=2)
        (tensor([[3., 2.]]), tensor([[2, 0]], dtype=torch.int32))
    """
    if prepared is not None:
        prepared.check_current(W_enc, b_enc, b_pre)
        if prepared.rounded is not None:
            values, indices = ops.topk_encode_prefiltered(x, W_enc, b_enc, b_pre, *prepared.rounded, k, selection)
            return values, indices
    bias = None if prepared is None else prepared.bias
    values, indices = ops.topk_encode(x, W_enc, b_enc, b_pre, k, selection, bias)
    return values, indices


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str = "relu"
) -> tuple[Tensor, Tensor]:
    """The meaning of topk_encode: dense, any dtype."""
    a = (x - b_pre) @ W_enc.T + b_enc
    score = (a.abs() if selection == "signed" else a) + 0.0  # + 0.0 makes -0.0 equal to +0.0 for every sort
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    values = a.gather(1, chosen)
    values = values.relu() if selection == "relu" else values
    order = (
        ((values.abs() if selection == "signed" else values) + 0.0).sort(dim=1, descending=True, stable=True).indices
    )
    broken = a.isnan().any(dim=1, keepdim=True)
    indices = torch.where(broken, torch.arange(k, device=x.device), chosen.gather(1, order))
    return torch.where(broken, torch.nan, values.gather(1, order)), indices.to(torch.int32)


# ------------------------------------------------------------------------------------------------------- registration


def topk_by_kernels(
    taken: Way, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of checked arguments on a GPU, by a `way` that is not plain torch. bias: what `encoder_bias` made of
    these weights before."""
    if taken == "stored":
        bias = encoder_bias(W_enc, b_enc, b_pre) if bias is None else bias
        return topk_stored(x, W_enc, bias, b_pre, k, selection)
    entry = tuned("topk_encode", W_enc, x.shape[0], k)
    blocks = None if entry is None else entry.blocks
    return topk_encode_triton(x, W_enc, b_enc, b_pre, k, selection, bias, blocks)


def _topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_encoder(x, W_enc, b_enc, b_pre, k, selection)
    taken = way(x, W_enc.shape[0], k)
    if taken != "torch":
        check_bias(bias, W_enc)
        return topk_by_kernels(taken, x, W_enc, b_enc, b_pre, k, selection, bias)
    if pays_to_round(x, W_enc):
        return topk_prefiltered_cpu(x, W_enc, b_enc, b_pre, None, None, k, selection)
    return topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection)


def _topk_encode_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_encoder(x, W_enc, b_enc, b_pre, k, selection)
    return x.new_empty(x.shape[0], k, dtype=sum_dtype(x)), x.new_empty(x.shape[0], k, dtype=torch.int32)


def through(values: Tensor, grad: Tensor | None, selection: str) -> Tensor:
    """The gradient of the pre-activations of a code's entries: none through an entry of value 0. None: zeros."""
    if grad is None:
        return torch.zeros_like(values)
    if selection == "relu":  # whose values are NaN or at least 0: one pass
        return torch.ops.aten.threshold_backward(grad, values, 0.0)
    return torch.where(values != 0, grad, 0)


def pre_bias_gradient(bias: Tensor, W_enc: Tensor) -> Tensor:
    """-(column sums of z) W_enc, which needs no sum over rows of [rows, d]. bias: those sums, the gradient of b_enc."""
    with torch.autocast(W_enc.device.type, enabled=False):
        return torch.addmv(W_enc[0], W_enc.T, bias.to(W_enc.dtype), beta=0, alpha=-1)  # beta 0: of any vector


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre = inputs[:4]
    ctx.selection = inputs[5]
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)  # which would make zeros for the indices
    ctx.save_for_backward(x, W_enc, b_pre, values, indices)


def _backward(ctx: Any, grad_values: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    """With g the gradient of the values, 0 where a value is 0, and z its dense form:
    x: z W_enc; W_enc: z^T (x - b_pre); b_enc: column sums of z; b_pre: see above."""
    x, W_enc, b_pre, values, indices = ctx.saved_tensors
    need_x, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    g = through(values, grad_values, ctx.selection)
    grad_x = grad_W = grad_b_enc = grad_b_pre = None
    if need_x:
        grad_x = ops.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
    if need_W or need_b_enc or need_b_pre:
        weight, bias = weight_gradient(g, indices, x, b_pre, W_enc.shape[0])
        grad_W = weight if need_W else None
        grad_b_enc = bias.to(x.dtype) if need_b_enc else None
        grad_b_pre = pre_bias_gradient(bias, W_enc) if need_b_pre else None
    return grad_x, grad_W, grad_b_enc, grad_b_pre, None, None, None


register(
    "topk_encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, SymInt k, str selection, Tensor? bias=None)"
    " -> (Tensor, Tensor)",
    _topk_encode,
    fake=_topk_encode_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def _topk_encode_prefiltered(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, low: Tensor, bounds: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    check_encoder(x, W_enc, b_enc, b_pre, k, selection)
    n_latents, d = W_enc.shape
    if low.shape[0] != n_latents or low.shape[1] != rounded_width(d) or bounds.shape != (3, n_latents):
        raise ValueError(
            f"prepared is for {low.shape[0]} latents of width up to {low.shape[1] - BIAS_COLUMNS}, W_enc has shape "
            f"{tuple(W_enc.shape)}; call prepare_encoder on these weights"
        )
    if not can_prefilter(x):
        return _topk_encode(x, W_enc, b_enc, b_pre, k, selection)
    return topk_prefiltered_cpu(x, W_enc, b_enc, b_pre, low, bounds, k, selection)


def _prefiltered_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, low: Tensor, bounds: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    return _topk_encode_fake(x, W_enc, b_enc, b_pre, k, selection)


def _prefiltered_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup_context(ctx, (*inputs[:4], *inputs[6:]), output)


def _prefiltered_backward(ctx: Any, grad_values: Tensor | None, grad_indices: None) -> tuple[Tensor | None, ...]:
    """As of the plain op: the bf16 copy takes no part."""
    return (*_backward(ctx, grad_values, grad_indices)[:4], None, None, None, None)


register(
    "topk_encode_prefiltered",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor low, Tensor bounds, SymInt k, str selection)"
    " -> (Tensor, Tensor)",
    _topk_encode_prefiltered,
    fake=_prefiltered_fake,
    backward=_prefiltered_backward,
    setup_context=_prefiltered_context,
)
