"""Untrained directions, random or given: where training starts, and the control a trained SAE must beat."""

from __future__ import annotations

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.sae.module import SAE


@torch.no_grad()
def randomise(sae: SAE, sample: Tensor, seed: int, *, target: Tensor | None = None) -> SAE:
    """Give `sae` random unit decoder rows and the encoder tied to them; see `tie`."""
    directions = torch.randn(sae.W_dec.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return tie(sae, directions, directions, sample, target=target)


@torch.no_grad()
def tie(
    sae: SAE,
    read: Tensor,
    written: Tensor,
    sample: Tensor,
    *,
    around: Tensor | None = None,
    target: Tensor | None = None,
) -> SAE:
    """Give `sae` unit decoder rows along `written [n_latents, d_model]` and encoder rows along `read`, which see rows less
    `around` (None: `b_pre`, with which `b_enc` becomes 0); other biases stay as they are.

    The encoder has one factor, with which the reconstruction of `sample [rows, d_model]` (of a transcoder, of the
    `target`) is closest: tied unit rows
    overshoot when many latents are active and undershoot when few are.
    """
    sae.W_dec.copy_(written / written.norm(dim=1, keepdim=True))
    sae.W_enc.copy_(read / read.norm(dim=1, keepdim=True))
    sae.b_enc.copy_(sae.W_enc @ (sae.b_pre - (sae.b_pre if around is None else around)))
    sample = sample.reshape(-1, sae.d_model).to(sae.device, sae.dtype)
    code = sae.encode(sample)
    start = sae.decode(SparseCode(torch.zeros_like(code.values), code.indices, code.n_latents), like=sample)
    guess = sae.decode(code, like=sample) - start
    wanted = sample if target is None else target
    factor = (guess * (wanted - start)).sum() / guess.square().sum().clamp_min(torch.finfo(guess.dtype).tiny)
    if factor > 0:
        sae.W_enc *= factor
        sae.b_enc *= factor
    return sae
