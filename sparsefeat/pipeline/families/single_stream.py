"""Transformers that run image and text tokens through the same blocks as one sequence from beginning to end: Lumina 2
and Z-Image. Two refiners before that see one of them alone.

Texts have different lengths there, so what is text in a batch is no rectangle: `layers` are read and edited at the
image's rows only. The refiner of the text has the text, padded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, TextLayout, UnknownRowsError
from sparsefeat.pipeline.families.transformer import Transformer

_LAYER = r"(layers|noise_refiner|context_refiner)\.\d+"


class SingleStream(Transformer):
    kinds = (
        ("single_block", r"layers\.\d+"),
        ("image_refiner", r"noise_refiner\.\d+"),
        ("text_refiner", r"context_refiner\.\d+"),
        ("joint_attention", _LAYER + r"\.(attn|attention)"),
        ("feed_forward", _LAYER + r"\.feed_forward"),
    )
    turns_queries = True
    text_modules = r"(context_refiner|time_caption_embed\.caption_embedder|cap_embedder)(\..*)?"

    def starts(self, run: Run) -> int | tuple[int, ...]:
        """The row of the image's first token in the common sequence, or one for each batch entry."""
        return 0

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if self.known(path) != "image":
            return super().rows(path, stream, tensor, run, apart)
        if tensor.ndim > 3 and not path:
            return 0, None  # what it predicts, in the layout of the latents
        # What a model pads its tokens with comes after them, in the refiner too.
        start = self.starts(run) if path.startswith("layers.") else 0
        made, last = None if run.grid is None else math.prod(run.grid), start if isinstance(start, int) else max(start)
        if made is None or tensor.ndim != 3 or tensor.shape[1] < last + made:
            raise UnknownRowsError(
                path,
                run.root,
                f"it has the shape {list(tensor.shape)} where the image has {made} tokens from {last} on",
            )
        return start, made

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        if path.startswith("context_refiner."):
            return {"text": (0, queries)}
        if run.grid is None:
            raise UnknownRowsError(path, run.root, "the grid of the image was not told by this call's arguments")
        made = math.prod(run.grid)
        if not path.startswith("layers."):
            return {"image": (0, made)}
        starts = self.starts(run)
        if isinstance(starts, int):
            return self.within(starts, made, queries)
        return tuple(self.within(start, made, queries) for start in starts)

    def within(self, start: int, made: int, total: int) -> dict[str, tuple[int, int]]:
        """The streams of one sequence: the text before the image, and after it what pads the batch."""
        return {"text": (0, start), "image": (start, start + made)}

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        return TextLayout(packed=True, more=True)
