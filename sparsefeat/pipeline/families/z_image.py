"""Z-Image: after the refiners, `layers` over [image; text], each padded to a multiple of 32 tokens.

The model takes lists, an entry for each batch entry: latents [C, frames, h, w] and text embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.single_stream import SingleStream

_MULTIPLE = 32  # of tokens, to which each stream is padded


class ZImage(SingleStream):
    classes = ("ZImageTransformer2DModel",)

    def within(self, start: int, made: int, total: int) -> dict[str, tuple[int, int]]:
        padded = -(-made // _MULTIPLE) * _MULTIPLE
        return {"image": (0, made), "text": (padded, total)}

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        latents = arguments.get("x")
        if not isinstance(latents, list) or not latents or not isinstance(latents[0], torch.Tensor):
            return None  # with reference images (Omni) an entry is a list: which rows are whose is not known here
        patch = arguments.get("patch_size", 2)  # the default of forward
        height, width = (side // patch for side in latents[0].shape[-2:])
        return height, width

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return None  # neither config nor pipeline has a size; its `__call__` falls back to 1024
