"""What concepts are looked for in: an SAE's latents, and the units they must beat. Pooled over an image's rows.

Neurons and components have two signs, and each sign is a unit of its own, as a latent has but one: what is measured of
non-negative units is then the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefeat.sae import SAE

# Dense activations that are held at a time.
AT_A_TIME = 64 << 20


@dataclass(frozen=True)
class Units:
    """name; n: how many; activations: of rows `[rows, d_model]` and their timesteps `[rows]` (None where they have none),
    `[rows, n]`, none negative."""

    name: str
    n: int
    activations: Callable[[Tensor, Tensor | None], Tensor]


def latents(sae: SAE, name: str) -> Units:
    def activations(rows: Tensor, timestep: Tensor | None) -> Tensor:
        if timestep is not None:
            sae.at_timestep(timestep)
        return sae.encode(rows.to(sae.device)).dense().relu().cpu()

    return Units(name, sae.n_latents, activations)


def neurons(fit_rows: Tensor) -> Units:
    """Every dimension above its median over `fit_rows`, and below it."""
    return _two_signed("neurons", fit_rows.median(0).values, None, fit_rows.shape[1])


def components(fit_rows: Tensor, k: int) -> Units:
    """The `k` directions of most variance in `fit_rows`, each of both signs."""
    wide = fit_rows.double()
    directions = torch.linalg.eigh(torch.cov(wide.T)).eigenvectors[:, -k:].flip(1)
    return _two_signed(f"PCA-{k}", wide.mean(0).to(fit_rows), directions.to(fit_rows), k)


def _two_signed(name: str, centre: Tensor, directions: Tensor | None, n: int) -> Units:
    def activations(rows: Tensor, timestep: Tensor | None) -> Tensor:
        along = rows - centre
        along = along if directions is None else along @ directions
        return torch.cat([along, -along], 1).relu()

    return Units(name, 2 * n, activations)


@dataclass(frozen=True)
class Pooled:
    """Of every image and unit `[images, n]`: the mean over its rows, and the largest."""

    mean: Tensor
    peak: Tensor


@torch.no_grad()
def pooled(units: Units, rows: Tensor, image: Tensor, timestep: Tensor | None = None) -> Pooled:
    """`image [rows]` numbers the image that a row is of, from 0 on."""
    n_images = int(image.max()) + 1
    mean = torch.zeros(n_images, units.n, dtype=torch.float64)
    peak = torch.zeros(n_images, units.n, dtype=torch.float32)
    for part in torch.arange(len(rows)).split(max(1, AT_A_TIME // (4 * units.n))):
        found = units.activations(rows[part], None if timestep is None else timestep[part])
        mean.index_add_(0, image[part], found.double())
        for number in image[part].unique().tolist():
            largest = found[image[part] == number].amax(0)
            peak[number] = torch.maximum(peak[number], largest)
    counts = torch.bincount(image, minlength=n_images).clamp_min(1)
    return Pooled((mean / counts[:, None]).float(), peak)
