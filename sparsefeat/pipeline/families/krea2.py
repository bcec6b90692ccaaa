"""Krea 2: blocks over one sequence [text; image]. The latent comes packed; the position ids of the whole sequence are
(0, y, x) for the image and zeros for the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.flux import Flux

_BLOCK = r"transformer_blocks\.\d+"


class Krea2(Flux):
    classes = ("Krea2Transformer2DModel",)
    kinds = (
        ("single_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
    joint_blocks = _BLOCK
    joint_attentions = _BLOCK + r"\.attn"
    single_blocks = _BLOCK
    text_modules = r"(text_fusion\.refiner_blocks|txt_in)(\..*)?"
    position_ids = "position_ids"

    def n_tokens(self, arguments: Mapping[str, Any]) -> int | None:
        return arguments["hidden_states"].shape[1]

    def text_tokens(self, run: Run) -> int | None:
        return run.arguments["encoder_hidden_states"].shape[1]  # [B, tokens, layers, width]

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        template = getattr(pipe, "prompt_template_encode_start_idx", None)
        return TextLayout(dropped=template) if isinstance(template, int) else None

    def width(self, module: nn.Module, io: str) -> int | None:
        if hasattr(module, "gate") and hasattr(module, "down"):  # feed-forward
            return module.down.out_features if io == "output" else module.gate.in_features
        return getattr(getattr(getattr(module, "attn", module), "to_q", None), "in_features", None)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return None  # neither the config nor the pipeline has a size
