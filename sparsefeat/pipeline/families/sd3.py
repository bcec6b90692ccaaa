"""Stable Diffusion 3 and 3.5: joint blocks that give (text, image). In their attention the image comes first.

The last block has no text stream: its output's text is None, what its attention gives for the text nobody uses. SD3.5-medium's first blocks have a second attention,
`attn2`, of the image alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer

_BLOCK = r"transformer_blocks\.\d+"


class SD3(JointTransformer):
    turns_queries = False
    classes = ("SD3Transformer2DModel", "SD3ControlNetModel")
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn"),
        ("self_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
        ("text_feed_forward", _BLOCK + r"\.ff_context"),
    )
    text_first = False
    joint_blocks = _BLOCK
    image_parts = rf"attn2(\..*)?|{JointTransformer.image_parts}"

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        clips = ("text_encoder", "text_encoder_2")  # of one tokenizer, side by side in the channels
        third = getattr(pipe, "text_encoder_3", None) is not None
        return TextLayout((clips, ("text_encoder_3",)) if third else (clips,), more=not third)

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        if getattr(module, "context_pre_only", False):  # of a block or of its attention
            return ("image",)
        return super().streams(path, module)
