"""The pickle that `torch.save` writes, read as the list of tensors and numbers it is; nothing in it is ever called.

A pickle is a program for a stack machine. `run` is that machine for the instructions torch uses, with the functions it
names replaced by descriptions: a tensor becomes a `Stored`, an ordered dict a dict, and whatever else is asked for is
refused by name. What a program can make of few bytes is bounded: MOST_STEPS containers, no set, no byte array.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from sparsefeat.sae.files.stored import Region, Unreadable

MOST_STEPS = 500_000  # a state dict takes about 45 a tensor
# Where torch keeps what it names in a pickle: `torch FloatStorage`, `torch float32`.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
REMEDY = "in the program that wrote it, save its weights alone, torch.save(model.state_dict(), path)"


@dataclass(frozen=True)
class Named:
    """A function or class the program names, and what its result is taken for."""

    name: str
    result: Callable[..., Any]


class MARK:
    """Where a list of arguments begins on the stack."""


def _tensor(storage: object, offset: object, shape: object, stride: object, *_: object) -> Any:
    if isinstance(storage, Unreadable):
        return storage
    if not isinstance(storage, Region):
        raise ValueError("a tensor without a storage")
    return storage.view(offset, shape, stride)


def _ordered(*pairs: object) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for first in pairs:
        for pair in first if isinstance(first, (list, tuple)) else ():
            _put(made, *pair)
    return made


def _first(*arguments: Any) -> Any:
    return arguments[0] if arguments else None


def _typed(*arguments: Any) -> Any:
    function, _, inner = arguments[:3]
    return function.result(*inner)


def _unreadable(what: str) -> Callable[..., Unreadable]:
    return lambda *_: Unreadable(what)


NAMED: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": _ordered,
    "torch._utils _rebuild_tensor": _tensor,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _first,
    "torch._utils _rebuild_parameter_with_state": _first,
    "torch._tensor _rebuild_from_type_v2": _typed,
    "torch.nn.parameter Parameter": _first,
    "torch Tensor": _first,
    "torch Size": lambda *sizes: tuple(sizes[0]) if sizes else (),
    "torch device": lambda *said: ":".join(map(str, said)),
    "torch.serialization _get_layout": _first,
    "collections Counter": lambda *_: Unreadable("a Counter"),
    "torch._utils _rebuild_tensor_v3": _unreadable("a tensor of a dtype that no SAE is stored in"),
    "torch._utils _rebuild_sparse_tensor": _unreadable("a sparse tensor"),
    "torch._utils _rebuild_qtensor": _unreadable("a quantized tensor"),
    "torch._utils _rebuild_nested_tensor": _unreadable("a nested tensor"),
    "torch._utils _rebuild_meta_tensor_no_storage": _unreadable("a tensor on the meta device, without numbers"),
    "torch._utils _rebuild_wrapper_subclass": _unreadable("a tensor of a class of its own"),
}


def run(path: Path, program: IO[bytes], storage: Callable[[Any], Any]) -> Any:
    """What the pickle at the program's position describes. storage: makes of a persistent id what it stands for."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for steps, (operation, said, _) in enumerate(pickletools.genops(program)):
        if steps > MOST_STEPS:
            raise ValueError(f"{path} has more than {MOST_STEPS} entries beside its weights: {REMEDY}")
        name, argument = operation.name, cast(Any, said)
        if name == "STOP":
            return stack.pop()
        if name in LITERALS:
            stack.append(LITERALS[name])
        elif name in NUMBERS:
            stack.append(argument)
        elif name in EMPTY:
            stack.append(EMPTY[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in TUPLES:
            size = TUPLES[name]
            stack[len(stack) - size :] = [tuple(stack[len(stack) - size :])]
        elif name == "TUPLE":
            stack.append(tuple(_marked(stack)))
        elif name in ("APPEND", "APPENDS"):
            items = _marked(stack) if name == "APPENDS" else [stack.pop()]
            _a(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = _marked(stack) if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(_a(dict, stack[-1]), key, value)
        elif name == "GLOBAL":
            stack.append(_named(path, argument))
        elif name == "BINPERSID":
            stack.append(storage(stack.pop()))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = _a(tuple, stack.pop())
            stack.append(_a(Named, stack.pop()).result(*arguments))
        elif name == "BUILD":
            stack.pop()  # attributes of an ordered dict or a tensor: no numbers of an SAE
        elif name == "POP":
            stack.pop()
        elif name != "PROTO":
            raise ValueError(f"{path} is a pickle that could run code when it is opened ({name}): {REMEDY}")
    raise ValueError(f"{path} is cut short: copy or download it again")


LITERALS: dict[str, bool | None] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
NUMBERS = {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING"}
EMPTY: dict[str, type] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _marked(stack: list[Any]) -> list[Any]:
    """What lies above the last mark, taken off with it."""
    at = len(stack) - 1 - stack[::-1].index(MARK)
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _a(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    if not isinstance(key, (str, int, float, type(None))):
        raise ValueError(f"a {type(key).__name__} for a key of a dict")
    into[key] = value


def _named(path: Path, argument: str) -> Any:
    """What stands for `module name`."""
    if argument in NAMED:
        return Named(argument, NAMED[argument])
    module, _, name = argument.partition(" ")
    if module in ("torch", "torch.storage") and name in STORAGES:
        return STORAGES[name]
    if module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout)):
        return getattr(torch, name)
    if module == "torch" and (name.endswith("Storage") or isinstance(getattr(torch, name, None), torch.qscheme)):
        return Unreadable(f"a torch.{name}")
    asked = argument.replace(" ", ".")
    raise ValueError(f"{path} is a pickle that could run code when it is opened (GLOBAL {asked}): {REMEDY}")
