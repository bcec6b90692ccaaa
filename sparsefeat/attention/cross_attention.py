"""The attention modules through which a pipeline's denoisers see the text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sparsefeat.pipeline.attention_seam import bypass
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components


def cross_attentions(pipe: Any, wanted_by: str) -> dict[str, nn.Module]:
    """The cross-attentions of its denoisers, by their paths in the pipeline.

    Raises ValueError where there are none, or one of them attends in a way that cannot be seen.
    """
    found = _found(pipe, cross_attentions_of)
    if not found:
        raise ValueError(
            f"{wanted_by} works on cross-attention, and {type(pipe).__name__} has none: its text and image tokens attend "
            "jointly, or not at all."
        )
    return found


def text_attentions(pipe: Any, wanted_by: str) -> dict[str, nn.Module]:
    """The same of `text_attentions_of`."""
    found = _found(pipe, text_attentions_of)
    if not found:
        raise ValueError(
            f"{wanted_by} works on the image's attention to the text, and {type(pipe).__name__} has none, or none of which "
            "it is known which keys are the text's."
        )
    return found


def _found(pipe: Any, of: Callable[[nn.Module], dict[str, nn.Module]]) -> dict[str, nn.Module]:
    found = {}
    for name, root in components(pipe).items():
        for path, module in of(root).items():
            why = bypass(name, module)
            if why is not None:
                raise ValueError(f"the attention of {name}.{path} cannot be read: {why}.")
            found[f"{name}.{path}"] = module
    return found


def cross_attentions_of(root: nn.Module) -> dict[str, nn.Module]:
    """Those of one model, by their paths in it; none of a model that does not make the image."""
    return _of_kind(root, "cross_attention")


def text_attentions_of(root: nn.Module) -> dict[str, nn.Module]:
    """The cross-attentions of one model, or the joint attentions of one that has none."""
    return _of_kind(root, "cross_attention") or _of_kind(root, "joint_attention")


def _of_kind(root: nn.Module, wanted: str) -> dict[str, nn.Module]:
    family, model = family_of(root), getattr(root, "_orig_mod", root)
    if not family.runs_in_steps or any(part in type(model).__name__ for part in ("ControlNet", "Adapter")):
        return {}
    return {
        path: module
        for path, kind, module in family.blocks(model)
        if kind == wanted
        and family.reads_text_at(model, path)
        and (kind == "joint_attention" or getattr(module, "is_cross_attention", True))
    }
