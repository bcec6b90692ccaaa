"""Corrections between steps: Markov chains at one noise level, towards the density that a composed score is of.

Du et al., "Reduce, Reuse, Recycle" (ICML 2023): composed scores are not those of the diffused composition, so after every
step the latents x are moved by a few steps of a chain at the level they have reached, with score s(x) = -eps(x) / sigma.

The step sizes are a share of the level's own noise; the paper's are a share of the training schedule's betas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefeat.arguments import number, whole

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Langevin:
    """Unadjusted Langevin (ULA): x <- x + eta / 2 s(x) + sqrt(eta) xi, `steps` times, eta = size sigma^2.

    Args:
        steps: of the chain, each a run of the denoiser for every prompt.
        size: above 0. seed: image i's noise is that of seed + i.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    steps: int = 4
    size: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        object.__setattr__(self, "size", number("size", self.size, 0, above=True))
        whole("seed", self.seed, 0)

    def moved(self, x: Tensor, score: Score, sigma: float, generators: Sequence[torch.Generator]) -> Tensor:
        eta = self.size * sigma**2
        for _ in range(self.steps):
            x = x + eta / 2 * score(x) + math.sqrt(eta) * noise_like(x, generators)
        return x


@dataclass(frozen=True)
class Hamiltonian:
    """Unadjusted Hamiltonian Monte Carlo (U-HMC) of unit mass: before each of `steps` trajectories the momentum v is partly
    drawn again, v <- damping v + sqrt(1 - damping^2) xi; then `leapfrogs` times, with h = size sigma,

        v <- v + h / 2 s(x),   x <- x + h v,   v <- v + h / 2 s(x)

    There is no step of acceptance: it needs energies, which models of scores have not.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    steps: int = 2
    leapfrogs: int = 3
    size: float = 0.2
    damping: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        whole("steps", self.steps)
        whole("leapfrogs", self.leapfrogs)
        object.__setattr__(self, "size", number("size", self.size, 0, above=True))
        object.__setattr__(self, "damping", number("damping", self.damping, 0, 1))
        whole("seed", self.seed, 0)

    def moved(self, x: Tensor, score: Score, sigma: float, generators: Sequence[torch.Generator]) -> Tensor:
        h = self.size * sigma
        momentum, pull = noise_like(x, generators), score(x)
        for trajectory in range(self.steps):
            if trajectory:
                fresh = noise_like(x, generators)
                momentum = self.damping * momentum + math.sqrt(1 - self.damping**2) * fresh
            for _ in range(self.leapfrogs):
                momentum = momentum + h / 2 * pull
                x = x + h * momentum
                pull = score(x)
                momentum = momentum + h / 2 * pull
        return x


def noise_like(x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """[images, ...] standard normal, each image's from its own generator (on the CPU: the same on every device)."""
    return torch.stack([torch.randn(x.shape[1:], generator=each, dtype=torch.float32) for each in generators]).to(x)
