"""Calls of an op that is nothing but allocations and launches, made again without its Python.

A call of few rows is its launches, and what is computed before each (sizes, chunks, strides, checks) takes the host longer
than the kernel runs. All of it follows from the arguments' numbers, shapes, strides, dtypes and alignment. So the second call
of a kind is recorded: which memory it allocates, and of every launch's arguments which are places in the memory of an input
or of an allocation. Later calls of this kind allocate, put in the pointers, and launch. Calls that do anything else on the
device, or that ask it for a number, are not recorded; they run as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .launch import RECORDING, Launch, known_triton

__all__ = ["Replayed", "forget"]

REPLAYS = os.environ.get("SPARSEFEAT_REPLAY", "1") not in ("", "0")
MOST_KEPT = 1024  # kinds of an op: row counts that never come again must not fill the memory
TRIES = 3  # of a call of a kind: a kernel may be compiled again in the one that is recorded
ALIGNED = 512  # bytes, as torch's own allocations
MOST_SCRATCH = 64 << 20  # what an op promises; a call that is made again holds all that it allocates at once

_aten = torch.ops.aten
_ALLOCATIONS = _aten.empty, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.empty_like
_VIEWS = (
    _aten.slice, _aten.select, _aten.view, _aten.view_as, _aten._unsafe_view, _aten.transpose, _aten.t, _aten.permute, _aten.expand,
    _aten.unsqueeze, _aten.squeeze, _aten.as_strided, _aten.detach, _aten.alias, _aten._reshape_alias,
)  # fmt: skip
_SAME = _aten.to, _aten.contiguous  # in inference mode and below autograd they come here also where they change nothing
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True)
class _Place:
    """Bytes from the beginning of the memory number `memory`: the inputs' first, then the results', then the scratch."""

    memory: int
    offset: int


class _Base:
    """The memory of a descriptor, as Triton asks for it."""

    __slots__ = ("at",)

    def __init__(self, at: int) -> None:
        self.at = at

    def data_ptr(self) -> int:
        return self.at


def _at(descriptor: Any, pointer: int) -> Any:
    """The descriptor of other memory. Made without a look at it: it is as the recorded one, and as well aligned."""
    made = object.__new__(type(descriptor))
    vars(made).update(vars(descriptor), base=_Base(pointer))
    return made


@dataclass(frozen=True)
class _Step:
    """One launch: `arguments` with holes for what is in memory."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]  # position, memory, offset
    tuples: list[tuple[int, int, int, tuple[Any, ...]]]  # and what follows the pointer in a tuple
    descriptors: list[tuple[int, int, int, Any]]  # of no memory: a recorded launch keeps no tensor alive


@dataclass(frozen=True)
class _Result:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    view: tuple[tuple[int, ...], tuple[int, ...], int] | None  # of its memory: size, stride, offset


@dataclass(frozen=True)
class _Recorded:
    device: torch.device
    results: list[_Result]
    single: bool  # one result, which is no tuple
    scratch: list[int]  # offsets of its parts
    scratch_bytes: int
    steps: list[_Step]

    def run(self, at: list[int], stream: int) -> Any:
        """at: the pointers of the inputs; changed."""
        found = []
        for result in self.results:
            made = torch.empty_strided(result.size, result.stride, dtype=result.dtype, device=self.device)
            at.append(made.data_ptr())
            found.append(made if result.view is None else made.as_strided(*result.view))
        if self.scratch:
            scratch = torch.empty(self.scratch_bytes, dtype=torch.uint8, device=self.device)
            first = scratch.data_ptr()
            for offset in self.scratch:
                at.append(first + offset)
        for step in self.steps:
            arguments = step.arguments.copy()
            for position, memory, offset in step.pointers:
                arguments[position] = at[memory] + offset
            for position, memory, offset, rest in step.tuples:
                arguments[position] = (at[memory] + offset, *rest)
            for position, memory, offset, descriptor in step.descriptors:
                arguments[position] = _at(descriptor, at[memory] + offset)
            x, y, z = step.grid
            step.run(x, y, z, stream, step.function, step.metadata, None, None, None, *arguments)
        return None if not found else found[0] if self.single else tuple(found)


class _Unrecorded(Exception):
    """The call did something that cannot be made again."""


class _Recorder(TorchDispatchMode):
    """Within this: allocations, views of known memory, and launches. `fault` says what else there was."""

    def __init__(self, inputs: list[torch.Tensor]):
        super().__init__()
        self.fault = ""
        self.launches: list[Launch] = []
        self.allocations: list[torch.Tensor] = []
        self.of = {id(tensor): _Place(i, 0) for i, tensor in enumerate(inputs)}
        self.n_inputs = len(inputs)
        self.held: list[Any] = list(inputs)  # an id is a tensor's as long as it lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if self.fault:  # what is not recorded is not held: the memory of a call would be that of all its parts together
            return found
        self.held.append(found)
        if packet in _ALLOCATIONS:
            self.of[id(found)] = _Place(self.n_inputs + len(self.allocations), 0)
            self.allocations.append(found)
        elif packet in _VIEWS and id(args[0]) in self.of and found.dtype == args[0].dtype:
            of = self.of[id(args[0])]
            moved = (found.storage_offset() - args[0].storage_offset()) * found.itemsize
            self.of[id(found)] = _Place(of.memory, of.offset + moved)
        elif not (packet in _SAME and found is args[0]):
            self.fault = str(func)
            for kept in (self.held, self.allocations, self.launches, self.of):
                kept.clear()
            if RECORDING.launches is self.launches:
                RECORDING.launches = None
        return found

    def place(self, tensor: torch.Tensor) -> _Place:
        if id(tensor) not in self.of:
            raise _Unrecorded("a tensor that is no argument")
        return self.of[id(tensor)]


def _recorded(recorder: _Recorder, result: Any, device: torch.device) -> _Recorded:
    """Raises _Unrecorded."""
    if recorder.fault or not recorder.launches:
        raise _Unrecorded(recorder.fault or "nothing was launched")
    results: list[_Result] = []
    memory_of: dict[int, int] = {}
    found = [] if result is None else list(result) if isinstance(result, tuple) else [result]
    for tensor in found:
        of = recorder.place(tensor)
        number = of.memory - recorder.n_inputs
        if number < 0 or number in memory_of:
            raise _Unrecorded("a result that is an argument's memory, or two of one memory")
        made = recorder.allocations[number]
        same = made is tensor
        view = None if same else (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
        memory_of[number] = recorder.n_inputs + len(results)
        results.append(_Result(tuple(made.shape), made.stride(), made.dtype, view))
    scratch: list[int] = []
    used = 0
    for number, made in enumerate(recorder.allocations):
        if number not in memory_of:
            memory_of[number] = recorder.n_inputs + len(results) + len(scratch)
            scratch.append(used)
            used += -(-made.untyped_storage().nbytes() // ALIGNED) * ALIGNED
    if used > MOST_SCRATCH:
        raise _Unrecorded("parts of the scratch that are not there together")

    def at(tensor: torch.Tensor) -> tuple[int, int]:
        of = recorder.place(tensor)
        inputs = recorder.n_inputs
        return (of.memory if of.memory < inputs else memory_of[of.memory - inputs]), of.offset

    steps = [_step(launch, at) for launch in recorder.launches]
    return _Recorded(device, results, not isinstance(result, tuple), scratch, used, steps)


def _step(launch: Launch, at: Callable[[torch.Tensor], tuple[int, int]]) -> _Step:
    arguments: list[Any] = []
    pointers, tuples, descriptors = [], [], []
    for position, argument in enumerate((*launch.arguments, *launch.constants)):
        kind = type(argument)
        if isinstance(argument, torch.Tensor):
            pointers.append((position, *at(argument)))
            argument = None
        elif isinstance(argument, tuple):
            first, *rest = argument
            if isinstance(first, torch.Tensor):
                tuples.append((position, *at(first), tuple(rest)))
                argument = None
            if any(type(other) not in _PLAIN for other in (first, *rest)[argument is None :]):
                raise _Unrecorded("a tuple of other things than a pointer and numbers")
        elif kind.__name__ == "TensorDescriptor":
            descriptors.append((position, *at(argument.base), _at(argument, 0)))
            argument = None
        elif kind not in _PLAIN:
            raise _Unrecorded(f"an argument of type {kind.__name__}")
        arguments.append(argument)
    compiled = launch.compiled
    return _Step(
        compiled.run, launch.grid, compiled.function, compiled.packed_metadata, arguments, pointers, tuples,
        descriptors,
    )  # fmt: skip


def _each_once(args: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """The arguments, and the tensors among them. Of one that is there twice, which of the two a launch is given could not be
    told."""
    found: list[Any] = []
    tensors: dict[int, torch.Tensor] = {}
    for arg in args:
        if isinstance(arg, torch.Tensor):
            arg = arg.detach() if id(arg) in tensors else arg
            tensors[id(arg)] = arg
        found.append(arg)
    return tuple(found), list(tensors.values())


_all: list[Replayed] = []


def forget() -> None:
    """Drop everything that was recorded: for who changes what launches depend on, as tests do."""
    for one in _all:
        one.kept.clear()


class Replayed:
    """`run`, whose calls of a kind are recorded the second time. settings: what it depends on besides its arguments."""

    def __init__(self, run: Callable[..., Any], settings: Callable[[], tuple[Any, ...]]) -> None:
        self.run, self.settings = run, settings
        self.kept: dict[tuple[Any, ...], _Recorded | int] = {}  # or how often it was tried
        _all.append(self)

    def __call__(self, *args: Any) -> Any:
        triton = known_triton() if REPLAYS else None
        if triton is None or not triton.launched or RECORDING.launches is not None or not triton.unwatched():
            return self.run(*args)
        at: list[int] = []
        tensors: list[torch.Tensor] = []
        driver = triton.driver.active
        device = driver.get_current_device()
        key: list[Any] = [driver, device, *self.settings()]
        for arg in args:
            kind = type(arg)
            if kind is _Tensor or kind is _Parameter:
                pointer = arg.data_ptr()
                key += (arg.dtype, arg.shape, arg.stride(), arg.get_device(), pointer & 15)
                tensors.append(arg)
                at.append(pointer)
            elif kind in _PLAIN:
                key += (kind, arg)
            elif isinstance(arg, Mapping):
                key.append(tuple(arg.items()))
            else:
                return self.run(*args)
        of = tuple(key)
        known = self.kept.get(of)
        if isinstance(known, _Recorded):
            return known.run(at, driver.get_current_stream(device))
        if known is None:
            if len(self.kept) >= MOST_KEPT:
                self.kept.clear()
            self.kept[of] = 0
        elif known < TRIES:
            return self._record(of, known, args, tensors, device)
        return self.run(*args)

    def _record(
        self, key: tuple[Any, ...], tried: int, args: tuple[Any, ...], tensors: list[torch.Tensor], device: int
    ) -> Any:
        where = tensors[0].device if tensors else torch.device("cpu")
        self.kept[key] = tried + 1
        if any(tensor.device != where for tensor in tensors) or (where.index or 0) != device:
            return self.run(*args)
        args, tensors = _each_once(args)
        recorder = _Recorder(tensors)
        RECORDING.launches = recorder.launches
        try:
            with recorder:
                result = self.run(*args)
            if recorder.fault:
                self.kept[key] = TRIES  # it will compute again
            elif RECORDING.launches is recorder.launches:  # a launch that went Triton's way ends it
                self.kept[key] = _recorded(recorder, result, where)
        except _Unrecorded:  # the call itself was run, and its result stands
            pass
        finally:
            RECORDING.launches = None
        return result
