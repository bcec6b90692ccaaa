"""Stable Cascade: both of its UNets, the prior's and the decoder's, whose blocks give feature maps [B, C, h, w]. Its
attention takes the feature map and gives one; what is inside it, and the layers that have the channels last, are no places
to hook.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Family, Rows, Run, UnknownRowsError

_KINDS = {"SDCascadeResBlock": "resnet", "SDCascadeAttnBlock": "transformer"}
_MAPS = r"(down|up)_blocks\.\d+\.\d+(\.depthwise)?|(down_downscalers|up_upscalers)\.\d+|embedding"


class StableCascade(Family):
    runs_in_steps = True

    classes = ("StableCascadeUNet",)

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            if re.fullmatch(r"(down|up)_blocks\.\d+\.\d+", path) and type(module).__name__ in _KINDS:
                yield path, _KINDS[type(module).__name__], module

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if tensor.ndim != 4 or not re.fullmatch(_MAPS, path):
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)} and is no block of the UNet")
        return 0, None

    def width(self, module: nn.Module, io: str) -> int | None:
        depthwise = getattr(module, "depthwise", None)
        if depthwise is not None:
            return depthwise.out_channels
        mapper = getattr(module, "kv_mapper", None)
        return mapper[-1].out_features if mapper is not None else None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        sample = arguments.get("sample")
        return tuple(sample.shape[-2:]) if isinstance(sample, torch.Tensor) else None
