"""Bria 3 and Fibo: built like FLUX.1; the single blocks of Fibo take and give one sequence [text; image]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.flux import Flux


class Bria(Flux):
    classes = ("BriaTransformer2DModel", "BriaFiboTransformer2DModel")

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        return TextLayout(more=True)  # filled up with zeros

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size = getattr(pipe, "default_sample_size", None)  # counted in tokens
        return (size, size) if isinstance(size, int) else None
