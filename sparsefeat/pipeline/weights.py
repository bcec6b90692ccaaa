"""Weights that are changed while a session is attached, and put back to the bit.

A change is a function from a weight to a weight of its shape. What stands in the model is always made anew from the weight as
it was: the changes of all sessions one after the other, in the order in which they came. So they come off in any order, and
when the last is gone the bits that were there are copied back. Models are shared between pipelines, so what is changed is
kept once a process, by parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.instrument import Instrument

WeightChange = Callable[[Tensor], Tensor]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class WeightPlace:
    """One instrument's change of one module's weight."""

    instrument: Instrument
    target: Target
    parameter: nn.Parameter
    change: WeightChange


@dataclass(eq=False)
class _Changed:
    """A parameter with changes, the bits that it had, and those of its changes that rest (outside their steps)."""

    parameter: nn.Parameter
    original: Tensor
    changes: list[WeightPlace] = field(default_factory=list)
    resting: set[WeightPlace] = field(default_factory=set)
    written: bool = False
    """What stands in the parameter is what the changes make, unless somebody else wrote into it."""

    def made(self) -> Tensor:
        weight = self.original.to(self.parameter.device, self.parameter.dtype)
        for place in self.changes:
            if place not in self.resting:
                weight = place.change(weight)
        if weight.shape != self.parameter.shape:  # copying would broadcast
            raise ValueError(
                f"a change made a weight {list(weight.shape)} of one that is {list(self.parameter.shape)}."
            )
        return weight

    @torch.no_grad()
    def write(self) -> None:
        self.parameter.copy_(self.made())
        self.written = True


_changed: dict[int, _Changed] = {}  # by the parameter's id, which is its own as long as it stands here


def plain_weight(target: Target) -> nn.Parameter:
    """The weight of the module, if it is one that can be read, differentiated and written.

    Raises:
        ValueError: not a Linear or Conv2d, or one with an adapter (LoRA), a quantised weight, or one that is elsewhere.
    """
    module, path = target.module, target.path
    if getattr(module, "base_layer", None) is not None or getattr(module, "lora_layer", None) is not None:
        raise ValueError(
            f"{path} carries an adapter (LoRA), so its weight is not all that it computes with: unload the adapter, or fuse it "
            "and unload it, before."
        )
    weight = vars(module)["_parameters"].get("weight")
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        raise ValueError(f"{path} is a {type(module).__name__}: weights of Linear and Conv2d modules can be changed.")
    if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.dtype not in _FLOATS:
        what = "parametrised" if weight is None else f"{type(weight).__name__} of {weight.dtype}"
        raise ValueError(
            f"the weight of {path} is quantised or packed ({what}), so single weights have no place in it: load the model in "
            "float32, bfloat16 or float16."
        )
    if weight.is_meta:
        raise ValueError(
            f"the weight of {path} is not on a device (sequential offload): load the pipeline whole, or offload whole models."
        )
    return weight


def put_on(place: WeightPlace) -> None:
    """Doing it twice is harmless, and so is an interrupt: what is to be written is noted before it is."""
    changed = _changed.get(id(place.parameter))
    if changed is None:
        changed = _changed[id(place.parameter)] = _Changed(place.parameter, place.parameter.detach().clone())
    if place not in changed.changes:
        changed.written = False
        changed.changes.append(place)
    changed.write()


def take_off(places: Sequence[WeightPlace]) -> None:
    """Doing it twice is harmless, and finishes what an interrupt left. All are out before a weight is made anew, as one of
    them may be a change that fails.
    """
    found = {id(place.parameter): place for place in places if id(place.parameter) in _changed}
    for key, place in found.items():
        if _changed[key].written:
            _warn_if_written_by_others(_changed[key], place)
    for key in found:
        changed = _changed[key]
        changed.written = False
        changed.changes = [other for other in changed.changes if other not in places]
        changed.resting.difference_update(places)
    for key in found:
        _changed[key].write()
        if not _changed[key].changes:
            del _changed[key]


def rest(place: WeightPlace, resting: bool) -> None:
    """Leave the change out, or put it in again, where it is not so already."""
    changed = _changed.get(id(place.parameter))
    if changed is None or (changed.written and (place in changed.resting) == resting):
        return
    changed.written = False
    if resting:
        changed.resting.add(place)
    else:
        changed.resting.discard(place)
    changed.write()


def _warn_if_written_by_others(changed: _Changed, place: WeightPlace) -> None:
    parameter = changed.parameter
    exchanged = vars(place.target.module)["_parameters"].get("weight") is not parameter
    if exchanged or (parameter.dtype == changed.original.dtype and not torch.equal(parameter, changed.made())):
        what = "exchanged" if exchanged else "written to"
        then = "the new one is left as it is" if exchanged else "it is put back to what it was before"
        warnings.warn(
            f"sparsefeat: the weight of {place.target.path} was {what} while a session had changed it (a fused LoRA, a "
            f"training?); {then}",
            UserWarning,
            stacklevel=2,
        )
