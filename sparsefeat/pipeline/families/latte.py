"""Latte: blocks over the places of a frame, the frames folded into the batch, and blocks over the frames of a place, the
places folded into the batch. In the first the rows of a video are its frames one after the other, a grid; in the second
they are its places one after the other, which no grid describes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sparsefeat.pipeline.families.cosmos import VideoTransformer
from sparsefeat.pipeline.families.family import Extent, Rows, Run, UnknownRowsError

_BLOCK = r"(temporal_)?transformer_blocks\.\d+"


class Latte(VideoTransformer):
    classes = ("LatteTransformer3DModel",)
    kinds = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", r"transformer_blocks\.\d+\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
    image_modules = r"pos_embed|norm_out|proj_out"

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if self.known(path) == "text" or run.grid is None:
            return super().rows(path, stream, tensor, run, apart)
        if tensor.ndim != 3 or tensor.shape[1] != self._folding(path, run)[1]:
            raise UnknownRowsError(
                path, run.root, f"it has the shape {list(tensor.shape)} where the video has {run.grid} places"
            )
        return 0, None

    def extent(self, path: str, stream: str, run: Run, shape: Sequence[int]) -> Extent:
        if run.grid is None or stream != "image":
            return super().extent(path, stream, run, shape)
        folded, _ = self._folding(path, run)
        return Extent(shape[0] // folded, math.prod(run.grid), None if path.startswith("temporal_") else run.grid)

    def _folding(self, path: str, run: Run) -> tuple[int, int]:
        """How many batch entries of a tensor one video has, and how many rows each."""
        assert run.grid is not None
        frames, places = run.grid[0], math.prod(run.grid[1:])
        return (places, frames) if path.startswith("temporal_") else (frames, places)
