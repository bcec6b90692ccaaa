"""Mochi: joint blocks that give (video, text); in their attention the video comes first, and of the text only what is no
padding, entry by entry, so that its queries are no rectangle of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Run, UnknownRowsError
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_BLOCK = r"transformer_blocks\.\d+"


class Mochi(JointTransformer):
    classes = ("MochiTransformer3DModel",)
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn1"),
        ("feed_forward", _BLOCK + r"\.ff"),
        ("text_feed_forward", _BLOCK + r"\.ff_context"),
    )
    block_order = ("image", "text")
    text_first = False
    joint_blocks = _BLOCK
    joint_attentions = _BLOCK + r"\.attn1"

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return False

    def attention_streams(self, path: str, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        raise UnknownRowsError(path, run.root, "it attends for each text by itself")

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
