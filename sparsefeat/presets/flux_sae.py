"""SAEs of FLUX.1: "Interpreting Large Text-to-Image Diffusion Models with Dictionary Learning" (arXiv 2505.24360).

FLUX.1-schnell; the image stream after double block 18, 3072 wide, 65,536 latents, k of 32 to 64, values of either sign,
on activations rotated to their principal components, standardised and clipped to +-10 (normalizer "pca"). ITDA
dictionaries of the same place are matching pursuit over data points of unit norm.

A latent's direction in the activations is its decoder row turned back from the components, (d sigma) P^T; both the paper
and the code steer with that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefeat.arguments import number
from sparsefeat.features.attached import check_sae
from sparsefeat.pipeline import Context, Hookpoint
from sparsefeat.sae import SAE
from sparsefeat.steering import Steer

BASE_MODEL = "black-forest-labs/FLUX.1-schnell"
HOOKPOINT = Hookpoint("transformer.transformer_blocks.18", "output", "image")

# Of 7; steering all of them leaves artefacts.
STEPS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Rectangle:
    """A mask over image tokens: 1 in rows `top` to `bottom` - 1 and columns `left` to `right` - 1 of the grid.

    Raises:
        ValueError: it is empty; or, in the call, beyond the image.
    """

    top: int
    left: int
    bottom: int
    right: int

    def __post_init__(self) -> None:
        if not 0 <= self.top < self.bottom or not 0 <= self.left < self.right:
            raise ValueError(f"{self} is empty: choose 0 <= top < bottom and 0 <= left < right.")

    def __call__(self, context: Context) -> Tensor:
        assert context.grid is not None
        height, width = context.grid[-2:]
        if self.bottom > height or self.right > width:
            raise ValueError(f"{self} does not lie in the grid of {height} x {width} image tokens.")
        mask = torch.zeros(height, width, dtype=torch.float32)
        mask[self.top : self.bottom, self.left : self.right] = 1
        return mask


def steer(
    sae: SAE,
    latent: int,
    strength: float,
    rectangle: tuple[int, int, int, int] | None = None,
    *,
    steps: Iterable[int] = STEPS,
    at: str | Hookpoint | None = None,
) -> Steer:
    """Add `strength` of a latent's direction inside a rectangle of image tokens, in the first steps.

    rectangle: (top, left, bottom, right) in tokens (16 pixels each), the last two exclusive; None for the whole image.
    at: default the SAE's own hookpoint, else the paper's.

    Raises:
        ValueError: as `Steer`; an empty rectangle.
    TypeError: `sae` is no SAE.
    """
    check_sae(sae)
    if rectangle is not None and len(rectangle) != 4:
        raise ValueError(f"rectangle={rectangle!r:.80} must be (top, left, bottom, right).")
    where = at or sae.config.hookpoint or HOOKPOINT
    mask = None if rectangle is None else Rectangle(*rectangle)
    return Steer(sae, add={latent: number("strength", strength)}, mask=mask, steps=list(steps), at=where)
