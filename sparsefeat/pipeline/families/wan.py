"""Wan 2.1 and 2.2 and models built like it (VACE, SkyReels): blocks that give the video's tensor, with self-attention
(`attn1`), cross-attention to the text (`attn2`) and a feed-forward (`ffn`).

Wan 2.2 A14B is two models, `transformer` for the noisy part of the schedule and `transformer_2` for the rest: a
hookpoint names one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.transformer import Transformer
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_BLOCK = r"(vace_)?blocks\.\d+"


class Wan(Transformer):
    classes = ("WanTransformer3DModel", "WanVACETransformer3DModel", "SkyReelsV2Transformer3DModel")
    kinds = (
        ("transformer_block", r"blocks\.\d+"),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ffn"),
    )
    never_reached = (
        "of Wan 2.2's two models only one may have run in this schedule, the model was compiled before this module was "
        "hooked, a cache skips the block, or it was replaced after `attach`: name the other model, take more steps, "
        "or attach first and compile then"
    )

    def width(self, module: nn.Module, io: str) -> int | None:
        width = super().width(module, io)
        if width is None and hasattr(module, "to_q"):  # WanAttention does not say how wide it is in every version
            width = getattr(module.to_q, "in_features", None)
        if width is None and hasattr(module, "attn1"):
            return self.width(module.attn1, io)
        return width

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
