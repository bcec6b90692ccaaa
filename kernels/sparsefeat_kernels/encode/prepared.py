"""What an encoder keeps between calls: its weights in bf16 and their norms, made once and owned by the caller."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dispatch import implementation
from ..threads import conducted, together
from ..tuning.table import tuned
from .gpu.prefilter import gpu_weights
from .rounded import bf16_products, bias_columns, encoder_bounds, rounded_width, rounding_of_weights

__all__ = ["PreparedEncoder", "prefilter_pays", "prepare_encoder"]

# Fewer rows at once do not pay for the pass over the weights that the first call after a change makes: it costs as much
# as the prefilter saves at about 60 rows (20,480 x 1280, two cores).
PREFILTERED_ROWS = 128


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """What `topk_encode(..., prepared=)` keeps of an encoder between calls: 2 n_latents (d + 3, rounded up to 32) bytes
    of bf16 weights and 12 n_latents bytes of norms; half the size of fp32 weights (on a GPU 2 n_latents d and 16 n_latents
    bytes). Made by `prepare_encoder`."""

    low: Tensor  # bf16 [n_latents, width]: W_enc, b_enc in three parts, zeros; on a GPU as `gpu_weights` has it
    bounds: Tensor  # fp32 [3, n_latents]: the bound is |x' - x'~| bounds[0] + |x'~| bounds[1] + bounds[2] + 2^-8 |p|
    _weights: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] = field(repr=False)
    _versions: tuple[int, int] = field(repr=False)

    def is_current(self, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether these are the very tensors it was made from, unchanged since (changes through `.data` go unseen)."""
        same = self._weights[0]() is W_enc and self._weights[1]() is b_enc
        return same and self._versions == (W_enc._version, b_enc._version)

    def check_current(self, W_enc: Tensor, b_enc: Tensor) -> None:
        if not torch.compiler.is_compiling() and not self.is_current(W_enc, b_enc):
            raise ValueError(
                "prepared was made from other weights, or from these before they changed; prepare_encoder again"
            )

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.bounds.nbytes


@torch.inference_mode(False)
@torch.no_grad()
def prepare_encoder(W_enc: Tensor, b_enc: Tensor, into: PreparedEncoder | None = None) -> PreparedEncoder:
    """bf16 weights and norms for `topk_encode(..., prepared=)`; make it again when the weights have changed.

    Two passes over the weights: at 20,480 x 1280 a seventh of what the product with 256 rows takes when memory is used
    again (`into`), under a third when it is new (23 and 44 ms beside 151 on one core of an AMD EPYC).

    Args:
        W_enc [n_latents, d], b_enc [n_latents]: float32, on a CPU or a GPU.
        into: an earlier one of the same shape, whose memory is used again (on a CPU); it must not be used any more.

    Raises: TypeError, ValueError for other dtypes and shapes; RuntimeError for tensors made in inference mode, whose
        changes cannot be noticed.
    """
    for name, tensor, dimensions in (("W_enc", W_enc, 2), ("b_enc", b_enc, 1)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32 to be prepared, got {tensor.dtype}; the prefilter speeds up fp32")
        if tensor.dim() != dimensions or tensor.shape[0] != W_enc.shape[0]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass W_enc [n_latents, d] and b_enc [n_latents]")
        if tensor.is_inference():
            raise RuntimeError(f"{name} was made in inference mode, where changes go unnoticed; prepare a clone of it")
    weights, versions = (weakref.ref(W_enc), weakref.ref(b_enc)), (W_enc._version, b_enc._version)
    if W_enc.device.type != "cpu" or implementation("topk_encode_prefiltered", W_enc) == "triton":
        return PreparedEncoder(*gpu_weights(W_enc, b_enc), weights, versions)
    width = rounded_width(W_enc.shape[1])
    if into is not None and into.low.shape == (len(W_enc), width):
        low, bounds = into.low, into.bounds
    else:
        low, bounds = torch.zeros(len(W_enc), width, dtype=torch.bfloat16), torch.empty(3, len(W_enc))
    _fill(W_enc.detach(), b_enc.detach(), low, bounds)
    return PreparedEncoder(low, bounds, weights, versions)


@conducted
def _fill(W_enc: Tensor, b_enc: Tensor, low: Tensor, bounds: Tensor) -> None:
    bias = b_enc.double()
    columns, rest = bias_columns(bias)
    together([*rounding_of_weights(low, W_enc, columns), *encoder_bounds(W_enc, bias, rest, low.shape[1], bounds)])


def prefilter_pays(W_enc: Tensor, rows: int, k: int) -> bool:
    """Whether encoding `rows` rows with prepared weights was measured to be faster than without.

    On a CPU with bf16 instructions: yes, for float32 and PREFILTERED_ROWS rows or more, which also pay for preparing once.
    On a GPU: what the tuning table says of the nearest shape; without a table no.
    """
    if W_enc.dtype != torch.float32:
        return False
    if implementation("topk_encode_prefiltered", W_enc) == "triton":
        plain, prefiltered = (tuned(op, W_enc, rows, k) for op in ("topk_encode", "topk_encode_prefiltered"))
        return plain is not None and prefiltered is not None and prefiltered.median_ms < plain.median_ms
    return W_enc.device.type == "cpu" and rows >= PREFILTERED_ROWS and bf16_products()
