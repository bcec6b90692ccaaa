"""The cross-attention modules of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn


def cross_attentions(pipe: Any) -> dict[str, nn.Module]:
    """Those of its denoisers, by their paths in the pipeline."""
    return {
        f"{name}.{path}": module
        for name in ("unet", "transformer", "prior")
        if getattr(pipe, name, None) is not None
        for path, module in cross_attentions_of(getattr(pipe, name)).items()
    }


def cross_attentions_of(root: nn.Module) -> dict[str, nn.Module]:
    """Those of one model, by their paths in it."""
    return {
        path: module
        for path, module in root.named_modules()
        if path.split(".")[-1] == "attn2" and getattr(module, "is_cross_attention", True)
    }
