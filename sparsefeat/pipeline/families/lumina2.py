"""Lumina 2: after the refiners, `layers` over [text without its padding; image], one after the other in each entry."""

from __future__ import annotations

import torch

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.reading import read_once
from sparsefeat.pipeline.families.single_stream import SingleStream


class Lumina2(SingleStream):
    classes = ("Lumina2Transformer2DModel",)

    def starts(self, run: Run) -> int | tuple[int, ...]:
        mask = run.arguments.get("encoder_attention_mask")
        lengths = read_once(_lengths, mask) if isinstance(mask, torch.Tensor) else (0,)
        return lengths[0] if len(set(lengths)) == 1 else lengths


def _lengths(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.sum(dim=1).tolist())
