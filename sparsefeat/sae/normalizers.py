"""What is done to a row before encoding and undone after decoding; `b_pre` is subtracted after it, by the encoder.

| normaliser | n(x) | n^-1(y) | published with |
|---|---|---|---|
| none, b_pre | x | y | most |
| standardize | (x - mean) / (std + eps) | y std + mean | OpenAI, SAeUron's `input_unit_norm`, SAELens' `layer_norm` |
| unit_norm | x / |x| | y |x| | ITDA |
| constant_norm | x sqrt(d_model) / |x| | y |x| / sqrt(d_model) | SAELens' `constant_norm_rescale` |
| pca | clip((x P - mean) / std, -clip, clip) | (y std + mean) P^T | FLUX SAEs (arXiv 2505.24360) |
| affine | the same with P = 1 | y std + mean | FLUX SAEs without whitening |
| timestep | x (1 + scale(t)) + shift(t) | y | DifFRACT (arXiv 2606.15796), after TIDE (arXiv 2503.07050) |

mean, std and |x| are a row's own, except for `pca` and `affine`, where they are part of the SAE. `std` is unbiased (divisor
`d_model - 1`); eps is added to the deviation, not to the variance, and only on the way in, as all three have it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

# Normalisers that divide every row by a number of its own; a change in code space is multiplied by it.
ROW_SCALED = ("standardize", "unit_norm", "constant_norm")


@dataclass(frozen=True, eq=False)
class PCA:
    """The tensors of the `pca` normaliser: `basis [d_model, d_model]` (columns are the components, orthonormal; None for
    `affine`, which has none), `mean` and `std [d_model]` in that basis, and the bound that normalised values are clipped
    to, None for no bound.
    """

    basis: Tensor | None
    mean: Tensor
    std: Tensor
    clip: float | None

    def normalize(self, rows: Tensor) -> Tensor:
        turned = rows if self.basis is None else rows @ self.basis
        normal = (turned - self.mean) / self.std
        return normal if self.clip is None else normal.clamp(-self.clip, self.clip)

    def denormalize(self, normal: Tensor) -> Tensor:
        return self._back(normal * self.std + self.mean)

    def directions(self, normal: Tensor) -> Tensor:
        """What adding `normal` in the normalised space adds to the activations, where nothing is clipped."""
        return self._back(normal * self.std)

    def _back(self, turned: Tensor) -> Tensor:
        return turned if self.basis is None else turned @ self.basis.T


def modulation(timestep: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """scale and shift of the `timestep` normaliser, both `[timesteps, d_model]`, of `timestep [timesteps]`.

    The timestep's sinusoidal embedding, `e / 2` sines and as many cosines of t 10000^(-i / (e / 2 - 1)), through two
    layers with SiLU after either, and one that gives scale, then shift.
    """
    weight = tensors["time_in_weight"]
    half = weight.shape[1] // 2
    exponent = torch.arange(half, device=weight.device, dtype=torch.float32) / (half - 1)
    angle = timestep.to(weight.device, torch.float32).view(-1, 1) * torch.exp(-math.log(10_000) * exponent)
    inner = torch.cat([angle.sin(), angle.cos()], 1).to(weight.dtype)
    for layer in ("time_in", "time_out"):
        inner = functional.silu(functional.linear(inner, tensors[f"{layer}_weight"], tensors[f"{layer}_bias"]))
    scale, shift = functional.linear(inner, tensors["modulation_weight"], tensors["modulation_bias"]).chunk(2, 1)
    return scale, shift


def normalize(rows: Tensor, normalizer: str, eps: float) -> Tensor:
    """`rows [rows, d_model]`, each normalised on its own; "pca" and "affine" are `PCA.normalize`, "timestep" is `modulation`. A row of zeros stays one."""
    if normalizer == "standardize":
        return (rows - rows.mean(-1, keepdim=True)) / (rows.std(-1, keepdim=True, correction=1) + eps)
    if normalizer in ROW_SCALED:
        scale = row_scale(rows, normalizer)
        return rows / torch.where(scale == 0, 1, scale)
    return rows


def denormalize(normal: Tensor, rows: Tensor, normalizer: str) -> Tensor:
    """n^-1 above, with the statistics of the original `rows`."""
    if normalizer not in ROW_SCALED:
        return normal
    out = normal * row_scale(rows, normalizer)
    return out + rows.mean(-1, keepdim=True) if normalizer == "standardize" else out


def row_scale(rows: Tensor, normalizer: str) -> Tensor:
    """`[rows, 1]`, of a normaliser in `ROW_SCALED`: what a change in code space is multiplied by in activations."""
    if normalizer == "standardize":
        return rows.std(-1, keepdim=True, correction=1)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return norm if normalizer == "unit_norm" else norm / math.sqrt(rows.shape[-1])
