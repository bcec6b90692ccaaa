"""The cross-attention modules of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsefeat.pipeline.attention_seam import bypass
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components


def cross_attentions(pipe: Any, wanted_by: str) -> dict[str, nn.Module]:
    """Those of its denoisers, by their paths in the pipeline.

    Raises ValueError where there are none, or one of them attends in a way that cannot be seen.
    """
    found = {}
    for name, root in components(pipe).items():
        for path, module in cross_attentions_of(root).items():
            why = bypass(name, module)
            if why is not None:
                raise ValueError(f"the attention of {name}.{path} cannot be read: {why}.")
            found[f"{name}.{path}"] = module
    if not found:
        raise ValueError(
            f"{wanted_by} works on cross-attention, and {type(pipe).__name__} has none: its text and image tokens attend "
            "jointly, or not at all."
        )
    return found


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
