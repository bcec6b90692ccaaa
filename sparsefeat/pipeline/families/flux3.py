"""FLUX.3: blocks of the image, of the reference images and of the text apart (`mode_blocks.image`, `mode_blocks.image_cond`,
`txt_mode_blocks`), then single blocks that give (text, [image; reference images]). Its position ids are (0, y, x, ...), the
sides scaled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, TextLayout
from sparsefeat.pipeline.families.flux import Flux
from sparsefeat.pipeline.families.transformer import Side

_SINGLE, _IMAGE, _TEXT = r"single_transformer_blocks\.\d+", r"mode_blocks\.image\.\d+", r"txt_mode_blocks\.\d+"


class Flux3(Flux):
    classes = ("Flux3Transformer2DModel",)
    kinds = (
        ("image_block", _IMAGE),
        ("text_block", _TEXT),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
        ("feed_forward", _SINGLE + r"\.ff"),
    )
    joint_blocks = _SINGLE
    joint_attentions = _SINGLE + r"\.attn"
    text_modules = rf"({_TEXT}|context_embedder)(\..*)?"
    image_modules = rf"({_IMAGE}|x_embedders\.image|norm_out|proj_out)(\..*)?"

    def side(self, run: Run) -> Side | None:
        references = run.arguments.get("image_cond_hidden_states")
        after = references.shape[1] if isinstance(references, torch.Tensor) else 0
        return None if run.grid is None else Side(0, math.prod(run.grid), after)

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if self._is_image_alone(path, run, tensor.shape[1] if tensor.ndim == 3 else 0):
            return 0, None
        return super().rows(path, stream, tensor, run, apart)

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        if self.known(path) == "text":
            return {"text": (0, queries)}
        return {} if self._is_image_alone(path, run, queries) else super().attention_streams(path, run, queries)

    def _is_image_alone(self, path: str, run: Run, length: int) -> bool:
        return self.known(path) == "image" and run.grid is not None and length == math.prod(run.grid)

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return path.startswith("single_transformer_blocks.")

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        return None  # a template stands around the prompt
