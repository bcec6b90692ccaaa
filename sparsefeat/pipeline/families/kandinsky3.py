"""Kandinsky 3: a UNet of residual and attention blocks, all of which take and give feature maps [B, C, h, w]."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, UnknownRowsError
from sparsefeat.pipeline.families.unet import UNet

_LEVEL = r"(down|up)_blocks\.\d+"
_KINDS = (
    ("block", _LEVEL),
    ("resnet", _LEVEL + r"\.resnets_(in|out)\.\d+"),
    ("transformer", _LEVEL + r"\.attentions\.\d+"),
)


class Kandinsky3(UNet):
    classes = ("Kandinsky3UNet",)

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            for kind, pattern in _KINDS:
                if re.fullmatch(pattern, path) and not isinstance(module, nn.Identity):
                    yield path, kind, module

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if tensor.ndim != 4:  # a sequence inside an attention may be the image's or the text's
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)}, which is no feature map")
        return 0, None

    def width(self, module: nn.Module, io: str) -> int | None:
        return None
