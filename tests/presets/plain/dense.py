"""An SAE as dense weights, and its codes as dense matrices: the common ground of the derivations in this folder.

pre = (x - b_pre) E^T + b_lat, z = S(pre), xhat = z D + b_out, for rows x; S is named by the functions that call it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DenseSAE:
    E: torch.Tensor
    """[n, d], one encoder row a latent."""
    D: torch.Tensor
    """[n, d], one decoder row a latent."""
    b_pre: torch.Tensor
    """[d], subtracted from the input."""
    b_lat: torch.Tensor
    """[n]."""
    b_out: torch.Tensor
    """[d], added to the output."""
    k: int

    @property
    def n(self) -> int:
        return self.E.shape[0]


def preactivations(sae: DenseSAE, x: torch.Tensor) -> torch.Tensor:
    """[..., d] to [..., n] in float64."""
    return (x.double() - sae.b_pre.double()) @ sae.E.double().T + sae.b_lat.double()


def decode(sae: DenseSAE, z: torch.Tensor) -> torch.Tensor:
    """[..., n] to [..., d] in float64."""
    return z.double() @ sae.D.double() + sae.b_out.double()


def keep_largest(values: torch.Tensor, k: int, order: torch.Tensor | None = None) -> torch.Tensor:
    """`values` where they are among the `k` largest of their row by `order` (themselves), 0 elsewhere.

    Of equal ones the lowest index is kept.
    """
    chosen = torch.sort(values if order is None else order, dim=-1, descending=True, stable=True).indices[..., :k]
    kept = torch.zeros_like(values)
    return kept.scatter(-1, chosen, values.gather(-1, chosen))


def topk_then_relu(sae: DenseSAE, x: torch.Tensor) -> torch.Tensor:
    """sdxl-unbox, ItD: the k largest raw pre-activations, those of them below zero become zero."""
    return keep_largest(preactivations(sae, x), sae.k).clamp(min=0)


def relu_then_topk(sae: DenseSAE, x: torch.Tensor) -> torch.Tensor:
    """SAeUron: the k largest of the rectified pre-activations. The dense codes equal those of `topk_then_relu`; only
    the indices of a row with fewer than k positives would differ, and a dense code has none."""
    return keep_largest(preactivations(sae, x).clamp(min=0), sae.k)


def relu(sae: DenseSAE, x: torch.Tensor) -> torch.Tensor:
    """Concept Steerers: every positive pre-activation, no selection."""
    return preactivations(sae, x).clamp(min=0)


def random_sae(n: int, d: int, k: int, seed: int = 0, tied: bool = True) -> DenseSAE:
    """Weights in float32: decoder rows of norm 1, small biases, the encoder near the decoder; with `tied` b_out is
    b_pre."""
    chance = torch.Generator().manual_seed(seed)
    D = torch.nn.functional.normalize(torch.randn(n, d, generator=chance), dim=1)
    E = D + 0.1 * torch.randn(n, d, generator=chance)
    b_pre = 0.1 * torch.randn(d, generator=chance)
    b_lat = 0.1 * torch.randn(n, generator=chance)
    b_out = b_pre if tied else 0.1 * torch.randn(d, generator=chance)
    return DenseSAE(E, D, b_pre, b_lat, b_out, k)
