"""HunyuanVideo 1.0 and 1.5: double blocks, in 1.0 single blocks after them, all of which give (video, text); in their
attention the video comes first. Not the blocks of `context_embedder.token_refiner`, which prepare the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"


class HunyuanVideo(JointTransformer):
    classes: tuple[str, ...] = ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel")
    kinds = (
        ("joint_block", _DOUBLE),
        ("joint_attention", _DOUBLE + r"\.attn"),
        ("feed_forward", _DOUBLE + r"\.ff"),
        ("text_feed_forward", _DOUBLE + r"\.ff_context"),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
    )
    block_order = ("image", "text")
    text_first = False
    joint_attentions = rf"({_DOUBLE}|{_SINGLE})\.attn"

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        template = call.get("prompt_template")
        cropped = template.get("crop_start") if isinstance(template, Mapping) else None
        return None if cropped is None or "15" in type(root).__name__ else TextLayout(dropped=cropped)

    def text_tokens(self, run: Run) -> int | None:
        return None  # 1.5 puts the tokens of its second encoder and of an image beside them: what is not video is text

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
