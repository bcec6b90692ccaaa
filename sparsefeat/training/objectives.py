"""What an SAE is trained to minimise.

    L = FVU(x, x_hat) + auxk * L_aux + multi_topk * FVU(x, x_hat_4k)

FVU = sum |x - x_hat|^2 / sum |x - mean(x)|^2, with the batch's own mean (as EleutherAI/sparsify has it): the scale of
the activations drops out, and one learning rate serves every hookpoint.

L_aux (AuxK, Gao et al. 2024, arXiv 2406.04093, appendix A.2): the dead latents alone reconstruct what was missed.
With e = x - x_hat held constant, and e_hat = z_aux W_dec from the k_aux dead latents of largest pre-activation,

    L_aux = min(n_dead / k_aux, 1) * sum |e_hat - e|^2 / sum |x - mean(x)|^2

The target is the residual itself and e_hat has no bias: SAeUron's released code has the negative residual and adds the
bias, sdxl-unbox adds it to both. The normalisation and the factor for few dead latents are sparsify's. The gradient
reaches the decoder and encoder rows of dead latents and nothing else.

Multi-TopK (the same paper, appendix): the code of 4k latents should reconstruct too, which keeps an SAE usable at
sparsities other than its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparsefeat_kernels import SparseCode, sparse_decode, topk_encode
from torch import Tensor

from sparsefeat.sae import SAE
from sparsefeat.sae.normalizers import standardize


@dataclass(frozen=True)
class Loss:
    """total carries the gradient; the parts are detached; code is what the batch was encoded to."""

    total: Tensor
    fvu: Tensor
    auxk: Tensor
    multi_topk: Tensor
    code: SparseCode


def training_loss(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None = None,
    *,
    auxk: float = 1 / 32,
    k_aux: int | None = None,
    multi_topk: float = 0.0,
) -> Loss:
    """The loss of a batch `x [rows, d_model]`; `dead [n_latents]` bool, None when none is."""
    code = sae.encode(x)
    x_hat = sae.decode(code, like=x)
    variance = total_variance(x)
    fvu = squared_error(x, x_hat) / variance
    total, nothing = fvu, fvu.detach() * 0
    aux = wide = nothing
    if auxk and dead is not None:
        latents = dead.nonzero().squeeze(-1)
        if latents.numel():
            aux = auxk_loss(sae, x, (x - x_hat).detach(), latents, k_aux or max(1, sae.d_model // 2), variance)
            total = total + auxk * aux
    if multi_topk:
        k = min(sae.n_latents, 4 * (sae.config.k or 1))
        wide = squared_error(x, sae.decode(sae.encode(x, k=k), like=x)) / variance
        total = total + multi_topk * wide
    return Loss(total, fvu.detach(), aux.detach(), wide.detach(), code)


def auxk_loss(sae: SAE, x: Tensor, residual: Tensor, latents: Tensor, k_aux: int, variance: Tensor) -> Tensor:
    """L_aux above, for the dead `latents [n_dead]`."""
    rows = standardize(x, sae.config.eps) if sae.config.normalizer == "standardize" else x
    k = min(k_aux, latents.numel())
    values, indices = topk_encode(rows, sae.W_enc[latents], sae.b_enc[latents], sae.b_pre.detach(), k, "relu")
    guess = sparse_decode(values, indices, sae.W_dec[latents], torch.zeros_like(sae.b_out))
    scale = sae.row_scale(x)
    if scale is not None:
        guess = guess * scale
    return min(latents.numel() / k_aux, 1.0) * squared_error(residual, guess) / variance


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).square().sum()


def total_variance(x: Tensor) -> Tensor:
    """`sum |x - mean(x)|^2`, at least the smallest normal number: a batch of equal rows must not divide by zero."""
    return (x - x.mean(0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
