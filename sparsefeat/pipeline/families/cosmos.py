"""Cosmos: blocks of the video with self-attention (`attn1`) and cross-attention to the text (`attn2`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.transformer import Transformer
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_BLOCK = r"transformer_blocks\.\d+"


class VideoTransformer(Transformer):
    """A latent [B, channels, frames, h, w] as one sequence of patches, frame by frame."""

    kinds: tuple[tuple[str, str], ...] = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)


class Cosmos(VideoTransformer):
    classes = ("CosmosTransformer3DModel",)
