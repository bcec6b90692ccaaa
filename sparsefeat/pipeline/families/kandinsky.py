"""Kandinsky 5: blocks of the text alone, then blocks of the video with cross-attention to it. The latent has its
channels last. (Kandinsky 2.2's decoder is a UNet.)

With sparse attention (`attention_type="nabla"`) the model puts its positions into the order of 8 x 8 tiles, which no
grid describes: there `Context.grid` is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.transformer import Side, Transformer
from sparsefeat.pipeline.families.video import default_video_grid, in_patches

_VIDEO, _TEXT = r"visual_transformer_blocks\.\d+", r"text_transformer_blocks\.\d+"


class Kandinsky5(Transformer):
    classes = ("Kandinsky5Transformer3DModel",)
    kinds = (
        ("text_block", _TEXT),
        ("transformer_block", _VIDEO),
        ("self_attention", _VIDEO + r"\.self_attention"),
        ("cross_attention", _VIDEO + r"\.cross_attention"),
        ("feed_forward", _VIDEO + r"\.feed_forward"),
    )

    text_modules = (
        rf"{_TEXT}(\..*)?|{_VIDEO}\.cross_attention\.(to_key|to_value|key_norm)(\..*)?|text_embeddings(\..*)?"
    )

    def side(self, run: Run) -> Side | None:
        grid = _grid(run.root, run.arguments)
        return None if grid is None else Side(0, math.prod(grid))

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        template = getattr(pipe, "prompt_template_encode_start_idx", None)
        return TextLayout(dropped=template) if isinstance(template, int) else None

    def width(self, module: nn.Module, io: str) -> int | None:
        for name, attribute in (("to_query", "in_features"), ("in_layer", "in_features")):
            if hasattr(module, name):
                return getattr(getattr(module, name), attribute, None)
        attention = getattr(module, "self_attention", None)
        return self.width(attention, io) if isinstance(attention, nn.Module) else None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return None if (arguments.get("sparse_params") or {}).get("to_fractal") else _grid(root, arguments)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root) if self.streams(path, root) == ("image",) else None


def _grid(root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
    latent = arguments.get("hidden_states")
    return in_patches(root, *latent.shape[1:4]) if isinstance(latent, torch.Tensor) and latent.ndim == 5 else None
