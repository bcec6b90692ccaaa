"""Kandinsky 5: blocks of the text alone, then blocks of the video with cross-attention to it. The latent has its
channels last. (Kandinsky 2.2's decoder is a UNet.)

With sparse attention (`attention_type="nabla"`) the model puts its positions into the order of 8 x 8 tiles, which no
grid describes: there `Context.grid` is None.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Transformer
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

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        return ("text",) if re.match(_TEXT, path) else ("image",)

    def stream_at(self, path: str, module: nn.Module, wanted: str) -> str | None:
        return self.streams(path, module)[0]

    def width(self, module: nn.Module, io: str) -> int | None:
        for name, attribute in (("to_query", "in_features"), ("in_layer", "in_features")):
            if hasattr(module, name):
                return getattr(getattr(module, name), attribute, None)
        attention = getattr(module, "self_attention", None)
        return self.width(attention, io) if isinstance(attention, nn.Module) else None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        latent, sparse = arguments.get("hidden_states"), arguments.get("sparse_params") or {}
        if not isinstance(latent, torch.Tensor) or latent.ndim != 5 or sparse.get("to_fractal"):
            return None
        return in_patches(root, *latent.shape[1:4])

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        return super().grid(run, shape) if len(shape) == 3 else None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root) if self.streams(path, root) == ("image",) else None
