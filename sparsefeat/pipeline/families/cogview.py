"""CogView 3 Plus and CogView 4: joint blocks that give (image, text), with the text first inside them.

CogView 3 runs its feed-forward on both as one sequence. CogView 4 runs it on the image and then on the text: which of
them it is, is told by how many rows there are, and refused where they are as many.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, TextLayout, UnknownRowsError
from sparsefeat.pipeline.families.joint import JointTransformer

_BLOCK = r"transformer_blocks\.\d+"


class CogView3(JointTransformer):
    turns_queries = False
    classes: tuple[str, ...] = ("CogView3PlusTransformer2DModel",)
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn1"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
    block_order = ("image", "text")
    joint_blocks = _BLOCK
    joint_attentions = _BLOCK + r"\.attn1"
    single_blocks = _BLOCK  # inside them both are one sequence

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        return TextLayout()  # padding included, which CogView 4 puts before the prompt


class CogView4(CogView3):
    turns_queries = True
    classes = ("CogView4Transformer2DModel",)
    in_turn = rf"{_BLOCK}\.(ff|norm2|norm2_context)(\..*)?"
    """Modules that are run on the image and then on the text."""

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if not re.fullmatch(self.in_turn, path):
            return super().rows(path, stream, tensor, run, apart)
        side, text = self.side(run), self.text_tokens(run)
        counts = {"image": side and side.total, "text": text}
        if (
            tensor.ndim != 3
            or side is None
            or text is None
            or side.total == text
            or tensor.shape[1] not in counts.values()
        ):
            raise UnknownRowsError(
                path,
                run.root,
                f"it runs on the image's {counts['image']} tokens and on the text's {text} in turn, and "
                f"this time it had the shape {list(tensor.shape)}",
            )
        if tensor.shape[1] != counts[stream]:
            return None
        return (side.before, side.made) if stream == "image" else (0, None)
