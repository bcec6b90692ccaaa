"""The cross-attention modules of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components


def cross_attentions(pipe: Any) -> dict[str, nn.Module]:
    """Those of its denoisers, by their paths in the pipeline."""
    return {
        f"{name}.{path}": module
        for name, root in components(pipe).items()
        for path, module in cross_attentions_of(root).items()
    }


def cross_attentions_of(root: nn.Module) -> dict[str, nn.Module]:
    """Those of one model, by their paths in it; none of a model that does not make the image."""
    family, model = family_of(root), getattr(root, "_orig_mod", root)
    if not family.runs_in_steps or any(part in type(model).__name__ for part in ("ControlNet", "Adapter")):
        return {}
    return {
        path: module
        for path, kind, module in family.blocks(model)
        if kind == "cross_attention" and getattr(module, "is_cross_attention", True)
    }
