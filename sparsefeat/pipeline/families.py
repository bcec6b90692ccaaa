"""The model families this package knows. A new one is a file with a `Family` and a line here."""

from __future__ import annotations

from torch import nn

from sparsefeat.pipeline.family import Family
from sparsefeat.pipeline.text_encoder import TextEncoder
from sparsefeat.pipeline.unet import UNet

FAMILIES: tuple[Family, ...] = (UNet(), TextEncoder(), Family())


def family_of(root: nn.Module) -> Family:
    """The family of one component of a pipeline; the structural `Family` where none claims it."""
    root = getattr(root, "_orig_mod", root)  # torch.compile's wrapper
    return next(family for family in FAMILIES if family.claims(root))
