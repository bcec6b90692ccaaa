"""AuraFlow: joint blocks that give (text, image), then single blocks that take and give one sequence [text; image]. The
text stream starts with eight register tokens, which belong to no word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer

_JOINT, _SINGLE = r"joint_transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"


class AuraFlow(JointTransformer):
    turns_queries = False
    classes = ("AuraFlowTransformer2DModel",)
    kinds = (
        ("joint_block", _JOINT),
        ("joint_attention", _JOINT + r"\.attn"),
        ("feed_forward", _JOINT + r"\.ff"),
        ("text_feed_forward", _JOINT + r"\.ff_context"),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
    )
    joint_blocks = rf"{_JOINT}|{_SINGLE}"
    joint_attentions = rf"({_JOINT}|{_SINGLE})\.attn"
    single_blocks = _SINGLE

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        registers = getattr(root, "register_tokens", None)
        return None if registers is None else TextLayout(before=registers.shape[1])

    def text_tokens(self, run: Run) -> int | None:
        text, registers = super().text_tokens(run), getattr(run.root, "register_tokens", None)
        return None if text is None or registers is None else text + registers.shape[1]
