"""Transformers that run image and text tokens through the same blocks as one sequence from beginning to end: Lumina 2
and Z-Image. Two refiners before that see one of them alone.

Texts have different lengths there, so what is text in a batch is no rectangle: `layers` are read and edited at the
image's rows only. The refiner of the text has the text, padded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Transformer
from sparsefeat.pipeline.part import Part

_LAYER = r"(layers|noise_refiner|context_refiner)\.\d+"


class SingleStream(Transformer):
    kinds = (
        ("single_block", r"layers\.\d+"),
        ("image_refiner", r"noise_refiner\.\d+"),
        ("text_refiner", r"context_refiner\.\d+"),
        ("joint_attention", _LAYER + r"\.(attn|attention)"),
        ("feed_forward", _LAYER + r"\.feed_forward"),
    )

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        return ("text",) if path.startswith("context_refiner.") else ("image",)

    def stream_at(self, path: str, module: nn.Module, wanted: str) -> str | None:
        (stream,) = self.streams(path, module)
        return stream if wanted in (stream, "image") else None

    def output_part(self, path: str, stream: str, output: Any, run: Run) -> Part:
        return self._image(path, output, run)

    def input_part(self, path: str, stream: str, given: Callable[[str | None], Any], run: Run) -> Part:
        name = "hidden_states" if isinstance(given("hidden_states"), torch.Tensor) else None
        return self._image(path, given(name), run, name)

    def starts(self, run: Run) -> int | tuple[int, ...]:
        """The row of the image's first token in the common sequence, or one for each batch entry."""
        return 0

    def _image(self, path: str, tensor: Any, run: Run, name: str | None = None) -> Part:
        sequence = isinstance(tensor, torch.Tensor) and tensor.ndim == 3
        if run.grid is None or not sequence or path.startswith("context_refiner."):
            return Part(name=name)
        length = math.prod(run.grid)
        if tensor.shape[1] < length:
            return Part(name=name)
        start = self.starts(run) if re.match(r"layers\.", path) else 0
        return Part(0, name, start, length)

    def attention_streams(self, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        start = self.starts(run)
        if run.grid is None or not isinstance(start, int):
            return {}
        return {"image": (start, start + math.prod(run.grid))}
