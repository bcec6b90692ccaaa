"""Whether a module itself computed, or something answered in its place.

diffusers' caches (first block, Mag, PAB, Faster, TaylorSeer, Sea, the text's keys and values) and its layer skipping put
a function of their own in the place of a module's forward. It hands the input on, repeats what was computed before, or
runs the module on a part of the batch. Hooks of torch lie around that function and would take its answer for the
module's, and an edit made there goes in again each time a residual is repeated that has it already. So on such a module
hooks lie inside, around the module's own forward: they run when it does, and what the cache keeps has the edit once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class InnerForward:
    """A module's own forward, with hooks around it, where a cache calls it."""

    def __init__(self, module: nn.Module, forward: Any):
        self.module: nn.Module = module
        self.forward: Any = forward
        self.before: list[Any] = []
        self.after: list[Any] = []
        functools.update_wrapper(self, forward, updated=())

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hook in tuple(self.before):
            changed = hook(self.module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        output = self.forward(*args, **kwargs)
        for hook in tuple(self.after):
            changed = hook(self.module, args, kwargs, output)
            output = output if changed is None else changed
        return output

    def __reduce__(self) -> Any:
        return _itself, (self.forward,)  # a copy has the forward alone


def inner_forward(module: nn.Module) -> InnerForward | None:
    """Where hooks of the module have to lie inside what may answer for it; None where torch's own will do."""
    for reference in _references(module):
        if isinstance(reference.original_forward, InnerForward):
            return reference.original_forward
    for reference in _references(module):  # in the order of registering: the first is the innermost
        if reference.original_forward is not None:
            reference.original_forward = InnerForward(module, reference.original_forward)
            return reference.original_forward
    return None


def needs_inner_forward(module: nn.Module) -> bool:
    return any(reference.original_forward is not None for reference in _references(module))


def take_out_inner(module: nn.Module) -> None:
    """Put the forward back that lies inside an `InnerForward` without hooks, wherever it has got to since."""
    holders = [*_references(module), module]
    for holder in holders:
        for name in ("forward", "original_forward"):
            held = vars(holder).get(name)
            if isinstance(held, InnerForward) and not held.before and not held.after:
                setattr(holder, name, held.forward)


def inner_forwards(module: nn.Module) -> Iterator[InnerForward]:
    for holder in [*_references(module), module]:
        for name in ("forward", "original_forward"):
            held = vars(holder).get(name)
            if isinstance(held, InnerForward):
                yield held


def _references(module: nn.Module) -> list[Any]:
    """What diffusers' hooks of the module call, the innermost first; empty where it has none."""
    registry = getattr(getattr(module, "_orig_mod", module), "_diffusers_hook", None)
    hooks = getattr(registry, "hooks", None) or {}
    return [reference for hook in hooks.values() if (reference := getattr(hook, "fn_ref", None)) is not None]


def _itself(forward: Any) -> Any:
    return forward
