"""One heat map: where in the image a word (or token) was attended to."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import number, sides, whole


@dataclass(frozen=True)
class HeatMap:
    """`values` [height, width] on the attention's grid, [frames, height, width] of a video, and the word they belong to."""

    values: Tensor
    label: str

    def __repr__(self) -> str:
        return f"HeatMap({self.label!r}, {' x '.join(map(str, self.values.shape))})"

    def frame(self, index: int) -> HeatMap:
        """The map of one (latent) frame of a video.

        Raises:
            ValueError: the map is an image's, or has no such frame.
        """
        if self.values.ndim != 3:
            raise ValueError(
                f"frame={index} was asked of the map of {self.label!r}, which is an image's; leave it out."
            )
        whole("frame", index, 0, len(self.values) - 1)
        return HeatMap(self.values[index], self.label)

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The map on `size` = (height, width), bicubic, not below zero.

        Raises:
            ValueError: `size` is not two whole numbers.
        """
        size = sides("size", size)
        if tuple(self.values.shape[-2:]) == size:
            return self.values
        return resize(self.values[None], (*self.values.shape[:-2], *size))[0].clamp(min=0)

    def scaled(self, size: tuple[int, int] | None = None) -> Tensor:
        """The map from its minimum to its maximum as [0, 1]; all zeros where it is constant."""
        values = self.values if size is None else self.resized(size)
        low, high = values.min(), values.max()
        if not high > low:
            return torch.zeros_like(values)
        return (values - low) / (high - low)

    def mask(self, threshold: float = 0.4, size: tuple[int, int] | None = None) -> Tensor:
        """Bool, of the values' shape: where the scaled map exceeds `threshold` (0.4 is DAAM's for its segmentation).

        Raises:
            ValueError: `threshold` is not from 0 to 1, or `size` not two whole numbers.
        """
        return self.scaled(size) > number("threshold", threshold, 0, 1)

    def overlay(self, image: Image.Image, strength: float = 0.5, colors: str = "turbo") -> Image.Image:
        """`image` with the map laid over it in the colours of a matplotlib colour map.

        Raises:
            TypeError: `image` is no PIL image.
            ValueError: the map has frames; `strength` is not from 0 to 1; colours that matplotlib has not.
        """
        if not isinstance(image, Image.Image):
            raise TypeError(f"image is {type(image).__name__}, not a PIL image; give one, PIL.Image.open(path).")
        if self.values.ndim != 2:
            raise ValueError(f"the map of {self.label!r} has {len(self.values)} frames; take one, heat.frame(0).")
        if colors not in matplotlib.colormaps:
            raise ValueError(
                f"colors={colors!r} is no colour map of matplotlib; use 'turbo', 'inferno' or another of its."
            )
        scaled = self.scaled((image.height, image.width)).cpu().numpy()
        painted = matplotlib.colormaps[colors](scaled)[..., :3]
        base = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        number("strength", strength, 0, 1)
        mixed = (1 - strength) * base + strength * painted
        return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    """Maps [n, h, w] or [n, frames, h, w] on another grid of as many frames, bicubic (linear in the maps: nothing is
    clamped).
    """
    if tuple(maps.shape[1:]) == tuple(size):
        return maps
    frames = maps.flatten(0, -3)[None]
    return F.interpolate(frames, size=size[-2:], mode="bicubic")[0].view(len(maps), *size)
