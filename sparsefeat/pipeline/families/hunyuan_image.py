"""HunyuanImage 2.1: built like HunyuanVideo, for images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.hunyuan_video import HunyuanVideo


class HunyuanImage(HunyuanVideo):
    classes = ("HunyuanImageTransformer2DModel",)

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        latent, patch = arguments.get("hidden_states"), getattr(getattr(root, "config", None), "patch_size", (1, 1))
        if not isinstance(latent, torch.Tensor) or latent.ndim != 2 + len(patch):
            return None
        return tuple(side // size for side, size in zip(latent.shape[2:], patch, strict=True))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return None  # its `__call__` falls back to a size that depends on the VAE
