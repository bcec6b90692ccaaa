"""LTX-Video: blocks that give the video's tensor. The latent comes packed; its frames, height and width are arguments.

A pipeline that appends the tokens of conditioning frames (`LTXConditionPipeline`) gives positions instead of them, and
then the sequence is no grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.transformer import Transformer, configured

_BLOCK = r"transformer_blocks\.\d+"


class LTX(Transformer):
    classes = ("LTXVideoTransformer3DModel",)
    kinds = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        sides = [arguments.get(name) for name in ("num_frames", "height", "width")]
        patch, frames_a_patch = configured(root, "patch_size") or 1, configured(root, "patch_size_t") or 1
        if not all(isinstance(side, int) for side in sides):
            return None
        frames, height, width = sides
        return frames // frames_a_patch, height // patch, width // patch
