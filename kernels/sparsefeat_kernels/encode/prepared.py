"""What an encoder keeps between calls, made once and owned by the caller: its weights in bf16 and their norms, or its bias."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dispatch import implementation
from ..threads import conducted, together
from .gpu.topk import way
from .product import encoder_bias
from .rounded import bf16_products, bias_columns, encoder_bounds, rounded_width, rounding_of_weights

__all__ = ["PreparedEncoder", "prefilter_pays", "prepare_encoder"]

# Fewer rows at once do not pay for the pass over the weights that the first call after a change makes: it costs as much
# as the prefilter saves at about 60 rows (20,480 x 1280, two cores).
PREFILTERED_ROWS = 128


class _Weight:
    """A tensor as it was: itself, its memory (`module.half()` and `.data =` exchange that alone), and its version."""

    def __init__(self, tensor: Tensor):
        self._tensor, self._memory = weakref.ref(tensor), weakref.ref(tensor.untyped_storage())
        self._place, self._version = tensor.data_ptr(), tensor._version

    def is_of(self, tensor: Tensor) -> bool:
        # Not by its address alone: that of memory which was given back is given away again.
        same = self._memory() is tensor.untyped_storage() and self._tensor() is tensor
        return same and (self._place, self._version) == (tensor.data_ptr(), tensor._version)


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """What `topk_encode(..., prepared=)` keeps of an encoder between calls. Made by `prepare_encoder`.

    On a CPU 2 n_latents (d + 3, rounded up to 32) bytes of bf16 weights and 12 n_latents bytes of norms, half the size of
    fp32 weights; on a GPU the bias b_enc - W_enc b_pre in fp32, 4 n_latents bytes.
    """

    # bf16 [n_latents, width]: W_enc, b_enc in three parts, zeros; and bounds, fp32 [3, n_latents]: an entry is within
    # |x' - x'~| bounds[0] + |x'~| bounds[1] + bounds[2] + 2^-8 |p|
    rounded: tuple[Tensor, Tensor] | None
    bias: Tensor | None  # fp32 [n_latents]
    _weights: tuple[_Weight, ...] = field(repr=False)

    def is_current(self, *weights: Tensor) -> bool:
        """Whether these (W_enc, b_enc and, where it was made with it, b_pre) are the very tensors it was made from,
        unchanged since (what is written into `.data` goes unseen; a tensor put in its place does not)."""
        return all(kept.is_of(now) for kept, now in zip(self._weights, weights, strict=False))

    def check_current(self, *weights: Tensor) -> None:
        if not torch.compiler.is_compiling() and not self.is_current(*weights):
            raise ValueError(
                "prepared was made from other weights, or from these before they changed; prepare_encoder again"
            )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*(self.rounded or ()), self.bias) if t is not None)


@torch.inference_mode(False)
@torch.no_grad()
def prepare_encoder(
    W_enc: Tensor, b_enc: Tensor, b_pre: Tensor | None = None, *, into: PreparedEncoder | None = None
) -> PreparedEncoder:
    """What of an encoder does not depend on the rows, for `topk_encode(..., prepared=)`; make it again when the weights
    have changed.

    On a CPU two passes over the weights: at 20,480 x 1280 a seventh of what the product with 256 rows takes when memory is
    used again (`into`), under a third when it is new (23 and 44 ms beside 151 on one core of an AMD EPYC). For the kernels
    of a GPU one pass, which every call with half-precision inputs makes without it.

    Args:
        W_enc [n_latents, d], b_enc [n_latents]: float32 on a CPU; on a GPU float32, bfloat16 or float16.
        b_pre: [d], of which the bias of half-precision inputs is made; on a CPU it takes no part.
        into: an earlier one of the same shape, whose memory is used again (on a CPU); it must not be used any more.

    Raises: TypeError, ValueError for other dtypes and shapes; RuntimeError for tensors made in inference mode, whose
        changes cannot be noticed.
    """
    by_kernels = implementation("topk_encode", W_enc) == "triton"
    for name, tensor, dimensions in (("W_enc", W_enc, 2), ("b_enc", b_enc, 1)):
        if tensor.dtype != torch.float32 and not (by_kernels and tensor.dtype == W_enc.dtype):
            raise TypeError(f"{name} must be float32 to be prepared, got {tensor.dtype}; the prefilter speeds up fp32")
        if tensor.dim() != dimensions or tensor.shape[0] != W_enc.shape[0]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass W_enc [n_latents, d] and b_enc [n_latents]")
    weights = (W_enc, b_enc) if b_pre is None or not by_kernels else (W_enc, b_enc, b_pre)
    if any(t.is_inference() for t in weights):
        raise RuntimeError("weights made in inference mode change unnoticed; prepare clones of them")
    kept = tuple(map(_Weight, weights))
    if by_kernels:
        if W_enc.dtype != torch.float32 and b_pre is None:
            raise ValueError("b_pre must be given for half-precision weights, whose bias it is part of")
        return PreparedEncoder(None, encoder_bias(W_enc, b_enc, b_enc if b_pre is None else b_pre), kept)
    if W_enc.device.type != "cpu":
        return PreparedEncoder(None, None, kept)
    width = rounded_width(W_enc.shape[1])
    with torch.device("cpu"):  # not the caller's default device: unlike an op this is not past torch's modes
        if into is not None and into.rounded is not None and into.rounded[0].shape == (len(W_enc), width):
            low, bounds = into.rounded
        else:
            low, bounds = (
                torch.zeros(len(W_enc), width, dtype=torch.bfloat16),
                torch.empty(3, len(W_enc), dtype=torch.float32),
            )
        _fill(W_enc.detach(), b_enc.detach(), low, bounds)
    return PreparedEncoder((low, bounds), None, kept)


@conducted
def _fill(W_enc: Tensor, b_enc: Tensor, low: Tensor, bounds: Tensor) -> None:
    bias = b_enc.double()
    columns, rest = bias_columns(bias)
    together([*rounding_of_weights(low, W_enc, columns), *encoder_bounds(W_enc, bias, rest, low.shape[1], bounds)])


def prefilter_pays(W_enc: Tensor, rows: int, k: int) -> bool:
    """Whether encoding `rows` rows with prepared weights is faster than without.

    On a CPU with bf16 instructions, measured: for float32 and PREFILTERED_ROWS rows or more, which also pay for preparing
    once. By a GPU's kernels in half precision: they then read W_enc once less.
    """
    if way(W_enc, W_enc.shape[0], k) != "torch":
        return W_enc.dtype != torch.float32
    at_home = W_enc.device.type == "cpu" and W_enc.dtype == torch.float32
    return at_home and rows >= PREFILTERED_ROWS and bf16_products()
