"""HiDream: double-stream blocks that give (image, text), then single-stream blocks over one sequence [image; text].

The text is T5's tokens, those of the last layer of Llama, and those of one more of its layers, which changes from block
to block. An image that is not square is padded behind its last patch to the most patches that the model takes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.transformer import Side, configured

_DOUBLE, _SINGLE = r"double_stream_blocks\.\d+", r"single_stream_blocks\.\d+"


class HiDream(JointTransformer):
    classes = ("HiDreamImageTransformer2DModel",)
    kinds = (
        ("joint_block", _DOUBLE),
        ("joint_attention", _DOUBLE + r"\.block\.attn1"),
        ("feed_forward", _DOUBLE + r"\.block\.ff_i"),
        ("text_feed_forward", _DOUBLE + r"\.block\.ff_t"),
        ("single_block", _SINGLE),
    )
    block_order = ("image", "text")
    text_first = False
    joint_blocks = rf"({_DOUBLE}|{_SINGLE})(\.block)?"
    joint_attentions = rf"{_DOUBLE}\.block\.attn1"
    single_blocks = _SINGLE
    text_parts = r"(ff_t|norm\d_t|attn1\.(to_[qkv]_t|to_out_t|[qk]_rms_norm_t))(\..*)?"
    image_parts = r"(ff_i|norm\d_i|attn1\.(to_[qkv]|to_out|[qk]_rms_norm))(\..*)?"

    def input_argument(self, path: str, stream: str, given: Callable[[str | None], Any]) -> tuple[str | None, bool]:
        if re.fullmatch(self.joint_attentions, path):
            return ("norm_hidden_states" if stream == "image" else "norm_encoder_hidden_states"), True
        return super().input_argument(path, stream, given)

    def side(self, run: Run) -> Side | None:
        if run.grid is None:
            return None
        made, padded = math.prod(run.grid), getattr(run.root, "max_seq", 0)
        return Side(0, made, 0 if run.grid[0] == run.grid[1] else padded - made)

    def width(self, module: nn.Module, io: str) -> int | None:
        inner = getattr(module, "block", None) or getattr(module, "shared_experts", None)
        return super().width(inner if isinstance(inner, nn.Module) else module, io)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size, patch = getattr(pipe, "default_sample_size", None), configured(root, "patch_size")
        return (size // patch, size // patch) if isinstance(size, int) and patch else None

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        """Llama's tokens twice: of its last layer, and of the layer that is the block's own."""
        return TextLayout((("text_encoder_3",), ("text_encoder_4",), ("text_encoder_4",)))

    def text_tokens(self, run: Run) -> int | None:
        t5, llama = (run.arguments.get(f"encoder_hidden_states_{name}") for name in ("t5", "llama3"))
        if not isinstance(t5, torch.Tensor) or llama is None:
            return None
        return t5.shape[1] + 2 * llama[0].shape[-2]
