"""LTX-Video: blocks that give the video's tensor. The latent comes packed; its frames, height and width are arguments.

A pipeline that appends the tokens of conditioning frames (`LTXConditionPipeline`) gives positions instead of them, and
then the sequence is no grid: its rows have to be stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.transformer import Transformer
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
        if not (isinstance(frames, int) and isinstance(height, int) and isinstance(width, int)):
            return None
        return in_patches(root, frames, height, width)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
