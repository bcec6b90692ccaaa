"""Blocks give a tensor, a tuple, or a dataclass. Here the stream's tensor is taken out and put back, the type kept.

Which element is meant is the model family's knowledge (`Family.output_part`); everything here goes by structure.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch


def element(output: Any, index: int) -> Any:
    """A module's output itself, or element `index` of a tuple or ModelOutput; None if it has no such element."""
    if isinstance(output, torch.Tensor):
        return output
    elements = list(output.values()) if isinstance(output, Mapping) else output
    return elements[index] if isinstance(elements, (tuple, list)) and len(elements) > index else None


def take(output: Any, index: int) -> torch.Tensor:
    """The stream's tensor in a module's output."""
    tensor = element(output, index)
    if isinstance(tensor, torch.Tensor):
        return tensor
    raise TypeError(
        f"a block gave {type(output).__name__} where a tensor, or a tuple with a tensor at position {index}, was "
        "expected; take a hookpoint from sparsefeat.hookpoints(pipe)"
    )


def put(output: Any, index: int, tensor: torch.Tensor) -> Any:
    """The same output, of the same type, with the stream's tensor replaced. The given object is not written to."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, Mapping):
        changed: Any = copy.copy(output)  # a ModelOutput keeps items and attributes in step when an item is set
        changed[list(output)[index]] = tensor
        return changed
    elements = [*output[:index], tensor, *output[index + 1 :]]
    if hasattr(output, "_make"):  # a named tuple takes its fields one by one
        return output._make(elements)
    return type(output)(elements)


def argument(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str | None) -> Any:
    """The value of a module's argument, given by position or by name; None if it was not given. `name` None: the
    first one.
    """
    name, position = _parameter(module, name)
    return kwargs.get(name) if name in kwargs else (args[position] if position < len(args) else None)


def take_argument(
    module: torch.nn.Module, name: str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> torch.Tensor:
    """The stream's tensor among a module's arguments. `name` None: the first one."""
    value = argument(module, args, kwargs, name)
    if not isinstance(value, torch.Tensor):
        name = name or _parameter(module, None)[0]
        raise TypeError(
            f"the argument {name!r} of {type(module).__name__} is {type(value).__name__}, not a tensor; take a "
            "hookpoint from sparsefeat.hookpoints(pipe)"
        )
    return value


def put_argument(
    module: torch.nn.Module, name: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], tensor: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the stream's tensor replaced, each still passed the way it was."""
    name, position = _parameter(module, name)
    if name in kwargs:
        return args, {**kwargs, name: tensor}
    return (*args[:position], tensor, *args[position + 1 :]), kwargs


def _parameter(module: torch.nn.Module, name: str | None) -> tuple[str, int]:
    """An argument's name and place in the forward of the module's class: offloading and compiling put a forward on the
    instance that may say nothing but (*args, **kwargs).
    """
    names = _parameters(type(getattr(module, "_orig_mod", module)).forward)[1:]
    if name is None:
        return (names[0] if names else "", 0)  # `forward(*args)` has no names: the first one given
    return name, names.index(name) if name in names else len(names)


@lru_cache(maxsize=256)  # reading a signature takes about 20 us, as long as a small block
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(function).parameters.values() if p.kind in positional)
