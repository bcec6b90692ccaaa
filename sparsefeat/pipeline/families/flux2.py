"""FLUX.2: double blocks that give (text, image), then single blocks that take and give one sequence [text; image].

Its position ids are (which image, y, x, ...); reference images have other first numbers than the one that is made, and
stand after it, or in the first step of [klein]'s cached variant before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.flux import Flux


class Flux2(Flux):
    classes = ("Flux2Transformer2DModel",)

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        return TextLayout()
