"""Exact rewritings of an SAE's tensors, for formats that store them differently."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig

# Normalisers under which `W_enc (x - b_pre) + b_enc` is all that happens before the activation.
AFFINE = ("none", "b_pre")


def wide(dtype: torch.dtype) -> torch.dtype:
    """What folding gives: of weights in half precision it is rounded once, to single, not to half again."""
    return torch.promote_types(dtype, torch.float32)


def encoder_bias(tensors: Mapping[str, Tensor], subtracted: Tensor | None) -> Tensor:
    """The `b_enc` with which subtracting `subtracted [d_model]` (None: nothing) instead of `b_pre` encodes the same.

    `W_enc (x - b_pre) + b_enc = W_enc (x - s) + (b_enc + W_enc (s - b_pre))`, worked out in float64.
    """
    b_pre = tensors["b_pre"].double()
    shift = -b_pre if subtracted is None else subtracted.double() - b_pre
    if not shift.any():  # without a copy of the weights in float64
        return tensors["b_enc"]
    return (tensors["b_enc"].double() + tensors["W_enc"].double() @ shift).to(tensors["b_enc"].dtype)


def check_affine(title: str, config: SAEConfig) -> None:
    """Refuse what a format cannot express that stores an encoder, a decoder and their biases and nothing else."""
    if config.normalizer not in AFFINE:
        raise ValueError(f"{title} cannot express normalizer {config.normalizer!r}: save in the native format instead")
    if config.skip:
        raise ValueError(f"{title} cannot express a skip (W_skip): save in the native format instead")


def cannot_express(title: str, config: SAEConfig) -> ValueError:
    return ValueError(f"{title} cannot express activation {config.activation!r}: save in the native format instead")
