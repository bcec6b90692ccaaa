"""LTX-Video: blocks that give the video's tensor. The latent comes packed; its frames, height and width are arguments.

A pipeline that is given conditioning frames (`LTXConditionPipeline`) has the positions of the tokens instead of them:
(seconds, y, x), those of the conditions first, and the video that is made after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.reading import read_once
from sparsefeat.pipeline.families.transformer import Side, Transformer
from sparsefeat.pipeline.families.video import default_video_grid, in_patches

_BLOCK = r"transformer_blocks\.\d+"


class LTX(Transformer):
    classes = ("LTXVideoTransformer3DModel",)
    kinds: tuple[tuple[str, str], ...] = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if isinstance(frames, int) and isinstance(height, int) and isinstance(width, int):
            return in_patches(root, frames, height, width)
        coordinates = _of_every_token(arguments)
        return None if coordinates is None else read_once(last_video, coordinates)

    def side(self, run: Run) -> Side | None:
        coordinates, side = _of_every_token(run.arguments), super().side(run)
        return side if side is None or coordinates is None else Side(coordinates.shape[-1] - side.made, side.made)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)


def _of_every_token(arguments: Mapping[str, Any]) -> torch.Tensor | None:
    """The positions [B, 3, tokens], where the model is given these (LTX-2's are of another shape)."""
    coordinates = arguments.get("video_coords")
    return coordinates if isinstance(coordinates, torch.Tensor) and coordinates.ndim == 3 else None


def last_video(coordinates: torch.Tensor) -> tuple[int, int, int] | None:
    """The grid of the last video among positions [B, (seconds, y, x), tokens], which begins at second 0; None where its tokens
    are not in row-major order, or those before it are not frames of its size. Waits for the device once.
    """
    seconds, y, x = coordinates[0].detach().cpu()
    begins = ((y == y.min()) & (x == x.min())).nonzero().flatten()
    size = len(y) - int(begins[-1])
    if len(y) % size:
        return None
    seconds, y, x = (axis.view(-1, size) for axis in (seconds, y, x))
    width = int((y[0] == y[0, 0]).sum())
    if size % width or (seconds != seconds[:, :1]).any() or (y != y[0]).any() or (x != x[0]).any():
        return None
    rows, columns = y[0].view(-1, width), x[0].view(-1, width)
    if (rows != rows[:, :1]).any() or (columns != columns[0]).any():
        return None
    times = seconds[:, 0].tolist()
    first = max(i for i in range(len(times)) if i == 0 or times[i] <= times[i - 1])
    return (len(times) - first, size // width, width) if times[first] == 0 else None
