"""Where an edit acts: the rows' conditions, and maps over the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import mask_map
from sparsefeat.pipeline import Context

Mask: TypeAlias = Tensor | Callable[[Context], Tensor] | None
GivenMask: TypeAlias = Mask | np.ndarray | Image.Image | Sequence[Sequence[float]]

# The factor of a row's edit by its condition. "cond+uncond-" is base_both of sdxl-unbox: guidance then sees the edit
# from both sides.
CONDITIONS: dict[str, dict[str, float]] = {
    "cond": {"cond": 1.0},
    "uncond": {"uncond": 1.0},
    "cond+uncond-": {"cond": 1.0, "uncond": -1.0},
    "both": {},
}


def check_condition(condition: str) -> str:
    if not isinstance(condition, str) or condition not in CONDITIONS:
        raise ValueError(f"condition={condition!r} is not known; use one of {', '.join(map(repr, CONDITIONS))}.")
    return condition


def condition_signs(condition: str, context: Context) -> Tensor:
    """fp32 [batch]: 1, -1 or 0 for each batch row. "both" edits every row, whatever further conditions there are."""
    if condition == "both":
        return torch.ones(len(context.entries), dtype=torch.float32)
    signs = CONDITIONS[condition]
    return torch.tensor([signs.get(row, 0.0) for row, _ in context.entries], dtype=torch.float32)


def on_grid(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps [..., H, W] as [..., positions] of a grid (h, w) or (frames, h, w).

    Made smaller by area (the mean over the pixels of a cell), larger bilinearly; frames share the map.
    """
    height, width = grid[-2:]
    leading = maps.shape[:-2]
    if tuple(maps.shape[-2:]) != (height, width):
        flat = maps.reshape(1, -1, *maps.shape[-2:])
        if maps.shape[-2] >= height and maps.shape[-1] >= width:
            flat = F.interpolate(flat, size=(height, width), mode="area")
        else:
            flat = F.interpolate(flat, size=(height, width), mode="bilinear", antialias=True)
        maps = flat.reshape(*leading, height, width)
    maps = maps.flatten(-2)
    return maps.repeat(*(1 for _ in leading), grid[0]) if len(grid) == 3 else maps


def map_of_rows(name: str, maps: Tensor, context: Context, n_images: int | None) -> Tensor:
    """An `image_map` as [batch, positions] of this context: each row gets its image's. `n_images` are those of the call, None
    where it does not say (a loop of one's own without prompts) and they are those of the rows.
    """
    n_images = n_images or max(context.prompt_index, default=0) + 1
    if context.grid is None:
        raise ValueError(f"{name} needs an image grid, which {context.hookpoint} has not (stream {context.stream!r}).")
    if maps.ndim == 3 and maps.shape[0] != n_images:
        raise ValueError(
            f"{name} has shape {list(maps.shape)}, maps for {maps.shape[0]} images; this call makes {n_images}."
        )
    resized = on_grid(maps, context.grid)
    if maps.ndim == 2:
        return resized.expand(context.batch, -1)
    return resized[[image for _, image in context.entries]]


def mask_of_rows(mask: Mask, context: Context, n_images: int | None) -> Tensor | None:
    """[batch, positions] weights of a mask: a checked map, or a callable giving [h, w] or [batch, h, w]."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return map_of_rows("mask", mask, context, n_images)
    given = mask_map("the tensor that mask= returned", mask(context))
    if context.grid is None:
        raise ValueError(f"mask needs an image grid, which {context.hookpoint} has not (stream {context.stream!r}).")
    if given.ndim == 3 and given.shape[0] != context.batch:
        raise ValueError(
            f"the tensor that mask= returned has shape {list(given.shape)}; give [height, width] or one map for each "
            f"of the {context.batch} batch rows."
        )
    return on_grid(given, context.grid).expand(context.batch, -1)
