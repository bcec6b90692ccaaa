"""Which attention modules of a pipeline a kind of map can be read from, told before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sparsefeat.pipeline.attention_seam import bypass, normalises_queries
from sparsefeat.pipeline.families.family import Family
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.weakly import Weakly

Kind = Literal["cross", "joint", "text_renormalised", "query_query", "concept"]
KINDS: tuple[Kind, ...] = ("cross", "joint", "text_renormalised", "query_query", "concept")
OF_JOINT: tuple[Kind, ...] = ("joint", "text_renormalised", "query_query", "concept")

Direction = Literal["image_to_text", "text_to_image"]
DIRECTIONS: tuple[Direction, ...] = ("image_to_text", "text_to_image")


@dataclass(frozen=True)
class Layer:
    """An attention module that is read: its path in the pipeline, and the model around it, neither of which it keeps."""

    path: str
    root_name: str
    family: Family
    _module: Weakly[nn.Module]
    _root: Weakly[nn.Module]

    @property
    def module(self) -> nn.Module:
        return _there(self._module)

    @property
    def root(self) -> nn.Module:
        return _there(self._root)


def _there(model: Weakly[nn.Module]) -> nn.Module:
    found = model()
    assert found is not None  # a call of it is going on, or it is being attached to
    return found


def layers_of(pipe: Any, kind: Kind | None, wanted: Sequence[str] | None) -> tuple[Kind, tuple[Layer, ...]]:
    """The kind that is meant and the modules to read for it.

    `wanted`: parts of the modules' paths; by default all, of a UNet those of its down and up blocks (DAAM's).

    Raises ValueError where the pipeline has no such modules, where `wanted` names none, or where one of them attends in
    a way that cannot be seen.
    """
    cross, joint = attentions_of(pipe, "cross_attention"), attentions_of(pipe, "joint_attention")
    meant: Kind = kind or ("cross" if cross else "joint")
    found = joint if meant in OF_JOINT else cross
    if not found:
        raise ValueError(none_to_read(pipe, meant, cross, joint))
    if wanted is not None:
        chosen = chosen_of(found, wanted, "joint-attention" if meant in OF_JOINT else "cross-attention")
    else:
        blocks = tuple(layer for layer in found if ".down_blocks." in layer.path or ".up_blocks." in layer.path)
        chosen = blocks or found
    refuse_bypassed(chosen)
    for layer in chosen if meant == "query_query" else ():
        if layer.family.turns_queries and not normalises_queries(layer.module):
            raise ValueError(
                f"the queries of {layer.path} cannot be seen before their rotary embedding, as nothing normalises them "
                "there: take kind='text_renormalised', or leave this module out of HeatMaps(layers=...)."
            )
    return meant, chosen


def refuse_unknown_words(
    pipe: Any, families: Sequence[tuple[Family, nn.Module]], words: Sequence[Any], who: str
) -> None:
    """Raise where words are named, and at which keys of a joint attention the prompt's tokens stand is not known."""
    named = [word for word in words if isinstance(word, str)]
    defaults = inspect.signature(type(pipe).__call__).parameters if named else {}
    call = {name: one.default for name, one in defaults.items() if one.default is not one.empty}
    for family, root in families if named else ():
        if family.text_layout(pipe, root, call) is None:
            raise ValueError(
                f"at which text keys of {type(root).__name__} the words of a prompt stand is not known in "
                f"{type(pipe).__name__}: name token positions, {who}(words=[2, 3]), in the place of {named[0]!r}."
            )


def chosen_of(found: Sequence[Layer], wanted: Sequence[str], what: str) -> tuple[Layer, ...]:
    """Those whose paths have one of the parts in them."""
    chosen = tuple(layer for layer in found if any(part in layer.path for part in wanted))
    if not chosen:
        paths = ", ".join(layer.path for layer in found)
        raise ValueError(f"layers={tuple(wanted)!r} match no {what} module; there are: {paths}.")
    return chosen


def refuse_bypassed(layers: Sequence[Layer]) -> None:
    """Raise where one of them attends in a way that cannot be seen."""
    for layer in layers:
        why = bypass(layer.root_name, layer.module)
        if why is not None:
            raise ValueError(f"the attention of {layer.path} cannot be read: {why}.")


def attentions_of(pipe: Any, kind: str) -> tuple[Layer, ...]:
    """The modules of this kind in the models that make the image, as their families list them."""
    found = []
    for name, root in components(pipe).items():
        model = getattr(root, "_orig_mod", root)
        family = family_of(root)
        if not family.runs_in_steps or any(part in type(model).__name__ for part in ("ControlNet", "Adapter")):
            continue
        for path, of_kind, module in family.blocks(model):
            plain = path.replace("_orig_mod.", "").replace("base_layer.", "")
            apart = kind == "cross_attention" and not getattr(module, "is_cross_attention", True)
            if of_kind == kind and family.reads_text_at(model, plain) and not apart:
                found.append(Layer(f"{name}.{plain}", name, family, Weakly(module), Weakly(model)))
    return tuple(found)


def none_to_read(pipe: Any, kind: Kind, cross: Sequence[Layer], joint: Sequence[Layer]) -> str:
    name = type(pipe).__name__
    if joint:
        return (
            f"kind={kind!r} is the softmax over the text of a cross-attention, and {name} has none, as text and image "
            "attend to each other there: take kind='joint' or kind='text_renormalised'."
        )
    if cross:
        return (
            f"kind={kind!r} is read where text and image attend to each other, and {name} attends to the text apart: "
            "take kind='cross'."
        )
    return (
        f"HeatMaps finds no attention between image and text in {name}, or none of which it is known which keys are the "
        "text's; use it with one of the families in docs/attention.md."
    )
