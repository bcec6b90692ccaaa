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
from sparsefeat_kernels import SparseCode, auxk_decode, auxk_encode
from torch import Tensor

from sparsefeat.arguments import number
from sparsefeat.sae import SAE
from sparsefeat.sae.activations import SELECTION


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
    number("auxk", auxk, 0)
    number("multi_topk", multi_topk, 0)
    variance = total_variance(x)
    latents = dead.nonzero().squeeze(-1) if auxk and dead is not None else None
    wanted = k_aux or max(1, sae.d_model // 2)
    code, aux_code, wide_code = _encode(sae, x, latents, wanted, wide=bool(multi_topk))
    x_hat, guess = _decode(sae, x, code, aux_code, latents)
    fvu = squared_error(x, x_hat) / variance
    total, nothing = fvu, fvu.detach() * 0
    aux = wide = nothing
    if guess is not None and latents is not None:
        aux = min(latents.numel() / wanted, 1.0) * squared_error((x - x_hat).detach(), guess) / variance
        total = total + auxk * aux
    if wide_code is not None:
        wide = squared_error(x, sae.decode(wide_code, like=x)) / variance
        total = total + multi_topk * wide
    return Loss(total, fvu.detach(), aux.detach(), wide.detach(), code)


def _encode(
    sae: SAE, x: Tensor, latents: Tensor | None, k_aux: int, wide: bool
) -> tuple[SparseCode, SparseCode | None, SparseCode | None]:
    """The code, that of the dead latents (None without any) and that of 4 k (None unless asked), in as few passes over
    the encoder as the activation allows: of top-k one, as the code of 4 k begins with the code of k."""
    config, n = sae.config, sae.n_latents
    of_topk = config.activation in ("topk", "signed_topk", "raw_topk")
    k = config.k or 1
    k_wide = min(n, 4 * k)
    aux_code = wide_code = None
    if latents is not None and latents.numel():
        rows = sae.normalize(x)
        selected = SELECTION[config.activation] if of_topk else "relu"
        weights = (sae.W_enc, sae.b_enc, sae.b_pre)
        first = k_wide if wide and of_topk else k if of_topk else 1
        prepared = sae.prepared(len(rows))
        parts = auxk_encode(rows, *weights, first, latents, min(k_aux, latents.numel()), selected, prepared=prepared)
        aux_code = SparseCode(parts[2], parts[3], n)
        code = SparseCode(parts[0], parts[1], n) if of_topk else sae.encode(x)
    else:
        code = sae.encode(x, k=k_wide) if wide and of_topk else sae.encode(x)
    if wide:
        wide_code = code if of_topk else sae.encode(x, k=k_wide)
        code = SparseCode(code.values[:, :k], code.indices[:, :k], n) if of_topk else code
    return code, aux_code, wide_code


def _decode(
    sae: SAE, x: Tensor, code: SparseCode, aux: SparseCode | None, latents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x_hat, and e_hat, the dead latents' guess at what is missing (without bias; None without their code)."""
    if aux is None or latents is None:
        return sae.decode(code, like=x), None
    x_hat, guess = auxk_decode(code.values, code.indices, aux.values, aux.indices, latents, sae.W_dec, sae.b_out)
    return sae.denormalize(x_hat, like=x), sae.change_of(guess, x)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    return (x - x_hat).square().sum()


def total_variance(x: Tensor) -> Tensor:
    """`sum |x - mean(x)|^2`, at least the smallest normal number: a batch of equal rows must not divide by zero."""
    return (x - x.mean(0)).square().sum().clamp_min(torch.finfo(x.dtype).tiny)
