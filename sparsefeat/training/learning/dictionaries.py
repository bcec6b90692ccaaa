"""Decoders that are made of other tensors: rows without a norm of their own, and rows in the hull of the data.

The SAE's tensors are made anew in every step, and what the loss says of them is pulled back to what is trained.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsefeat.sae import SAE


class FreeRows(nn.Module):
    """Encoder and decoder rows of any norm. What the SAE has is the same function with unit decoder rows: activations times
    the norm, so that selection and penalties are of that."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.W_enc: nn.Parameter = nn.Parameter(torch.zeros_like(sae.W_enc))
        self.b_enc: nn.Parameter = nn.Parameter(torch.zeros_like(sae.b_enc))
        self.W_dec: nn.Parameter = nn.Parameter(torch.zeros_like(sae.W_dec))

    @torch.no_grad()
    def begin(self, sae: SAE, rows: Tensor, seed: int) -> None:
        for name in ("W_enc", "b_enc", "W_dec"):
            self.get_parameter(name).copy_(sae.get_parameter(name))

    def made(self) -> dict[str, Tensor]:
        norm = torch.linalg.vector_norm(self.W_dec, dim=1)
        return {"W_enc": self.W_enc * norm[:, None], "b_enc": self.b_enc * norm, "W_dec": self.W_dec / norm[:, None]}

    def scaled(self, encoder: float, code: float) -> None:
        self.W_enc *= encoder
        self.b_enc *= code

    def settle(self) -> None:
        """Nothing binds these."""


class Archetypal(nn.Module):
    """exp(m) (W C + R): `mixture` W `[n_latents, archetypes]`, `centres` C `[archetypes, d_model]`, `relaxed` R
    `[n_latents, d_model]`, `log_factor` m (arXiv 2502.12892, equation 4)."""

    def __init__(self, sae: SAE, archetypes: int, delta: float) -> None:
        super().__init__()
        n, d = sae.W_dec.shape
        self.delta = delta
        self.register_buffer("centres", sae.W_dec.detach().new_zeros(archetypes, d))
        self.mixture: nn.Parameter = nn.Parameter(sae.W_dec.detach().new_zeros(n, archetypes))
        self.relaxed: nn.Parameter = nn.Parameter(torch.zeros_like(sae.W_dec))
        self.log_factor: nn.Parameter = nn.Parameter(sae.W_dec.detach().new_zeros(()))

    @torch.no_grad()
    def begin(self, sae: SAE, rows: Tensor, seed: int) -> None:
        """Every latent starts at one centre, of the rows less the output bias; the encoder at the latent's direction."""
        from scipy.cluster.vq import kmeans2

        n, p = self.mixture.shape
        if len(rows) < p:
            raise ValueError(f"archetypes is {p} but the start values have {len(rows)} rows: make it smaller")
        centred = rows - sae.b_out
        found, _ = kmeans2(centred.double().cpu().numpy(), p, minit="points", seed=seed, missing="warn")
        centres = self.get_buffer("centres")
        centres.copy_(torch.from_numpy(found))
        self.mixture.zero_()
        self.mixture[torch.arange(n), torch.arange(n) % p] = 1
        sae.W_dec.copy_(self.made()["W_dec"])
        norm = torch.linalg.vector_norm(sae.W_dec, dim=1, keepdim=True)
        direction = sae.W_dec / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        # A latent's own centre is reconstructed with an activation of one.
        sae.W_enc.copy_(direction / norm.clamp_min(0.1 * float(norm.mean())))

    def made(self) -> dict[str, Tensor]:
        return {"W_dec": self.log_factor.exp() * (self.mixture @ self.get_buffer("centres") + self.relaxed)}

    def scaled(self, encoder: float, code: float) -> None:
        """Directions are of the data's shape, whatever its units: the code carries those."""

    def settle(self) -> None:
        """Put the rows back to where they may be."""
        self.mixture.relu_()
        self.mixture /= self.mixture.sum(1, keepdim=True) + 1e-8
        norm = torch.linalg.vector_norm(self.relaxed, dim=1, keepdim=True)
        self.relaxed *= (self.delta / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1)


@torch.no_grad()
def remake(dictionary: FreeRows | Archetypal, sae: SAE) -> None:
    """The SAE's tensors from what is trained."""
    for name, tensor in dictionary.made().items():
        sae.get_parameter(name).copy_(tensor)


def pull_back(dictionary: FreeRows | Archetypal, gradients: Mapping[str, Tensor]) -> list[Tensor]:
    """Gradients of `dictionary.parameters()` from those of what it makes."""
    made = dictionary.made()
    outputs = [made[name] for name in made]
    found = torch.autograd.grad(outputs, list(dictionary.parameters()), [gradients[name] for name in made])
    return list(found)
