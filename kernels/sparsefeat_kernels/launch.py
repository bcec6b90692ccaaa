"""Launches a kernel again without Triton's way through Python, which binds and looks at every argument anew.

That way is most of a launch's time on the host, and small kernels wait for it: `topk_encode` of 256 rows takes 132 us of
processor time with it and 83 without (`python -m bench.host`, with and without --plain, an AMD EPYC's core). So a compiled
kernel is kept under a key from which all follows that Triton compiles for, and more: the values of whole numbers and
constants (Triton: whether they are 1, divisible by 16, of 32 bits), types, dtypes, blocks of descriptors, device, driver.
Tensors are kept for where all begin at multiples of 16 bytes. Everything else goes Triton's way: the first launch of a key,
pointers that are not so aligned, and whatever Triton does besides (profilers' hooks, debugging, instrumentation, the
interpreter, compilation without a launch). What a launch again leaves out is Triton's look whether a global that the kernel
reads has changed since; none of ours does.
"""

from __future__ import annotations

import functools
import importlib
import threading
from typing import Any, NamedTuple

import torch

__all__ = ["KNOWN", "RECORDING", "Launch", "Launcher", "known_triton"]

# Versions whose compiled kernels are launched as below. Others go Triton's way.
KNOWN = ((3, 6), (3, 7))
MOST_KEPT = 1024  # of a kernel: row counts that never come again must not fill the memory

_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter


class Launch(NamedTuple):
    """What was launched: Triton's compiled kernel, and its arguments, the last of which are constants of the compilation."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    constants: tuple[Any, ...]


class _Recording(threading.local):
    """The launches of this thread since somebody asked for them; None: nobody did, or one was made in Triton's way."""

    launches: list[Launch] | None = None


RECORDING = _Recording()


class _Triton:
    """What is asked of Triton at every launch, once somebody launches."""

    def __init__(self) -> None:
        triton = importlib.import_module("triton")
        self.jit: Any = triton.runtime.jit.JITFunction
        version = tuple(map(int, triton.__version__.split(".")[:2]))
        self.known = version in KNOWN and not torch.version.hip and not triton.knobs.runtime.interpret
        self.driver: Any = triton.runtime.driver
        self.knobs: Any = triton.knobs
        self.launched = False  # its driver is made, which needs a compiler of C

    def unwatched(self) -> bool:
        """Whether nobody wants to see Triton's own launch, or has put another in its place."""
        runtime, compilation = self.knobs.runtime, self.knobs.compilation
        return not (
            self.jit.run.__module__ != self.jit.__module__
            or _hooks(runtime.launch_enter_hook)
            or _hooks(runtime.launch_exit_hook)
            or runtime.debug
            or runtime.add_stages_inspection_hook is not None
            or compilation.instrumentation_mode
        )


@functools.cache
def known_triton() -> _Triton | None:
    """None: of another version, or it interprets."""
    triton = _Triton()
    return triton if triton.known else None


class Launcher:
    """Launches of one kernel, of what `triton.jit` made of it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.names = [parameter.name for parameter in getattr(kernel, "params", ())]
        self.kept: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self.triton = known_triton()
        self.known = self.triton is not None and type(kernel) is self.triton.jit

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        triton = self.triton
        if triton is None or not self.known or not triton.unwatched() or self.kernel.pre_run_hooks:
            self._plainly(grid, args, options)
            return
        driver = triton.driver.active
        device = driver.get_current_device()
        key: list[Any] = [driver, device]
        if _add(key, args) & 15:  # a pointer that is not aligned, or an argument of no known kind
            self._plainly(grid, args, options)
            return
        found = tuple(key), tuple(options.items())
        kept = self.kept.get(found)
        if kept is None:
            compiled = self._plainly(grid, args, options)
            rest = self.names[len(args) :]
            if compiled is not None and all(name in options for name in rest):
                if len(self.kept) >= MOST_KEPT:
                    self.kept.clear()
                self.kept[found] = compiled, tuple(options[name] for name in rest)
            return
        compiled, constants = kept
        x, y, z, *_ = *grid, 1, 1
        if RECORDING.launches is not None:
            RECORDING.launches.append(Launch(compiled, (x, y, z), args, constants))
        stream = driver.get_current_stream(device)
        compiled.run(
            x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args, *constants
        )  # fmt: skip

    def _plainly(self, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        RECORDING.launches = None
        if self.triton is not None:
            self.triton.launched = True
        return self.kernel[grid](*args, **options)


def _hooks(hook: Any) -> Any:
    """What a launch would call: of a chain its members, or the one that somebody put in its place."""
    return getattr(hook, "calls", hook)


def _add(key: list[Any], args: tuple[Any, ...]) -> int:
    """Add to the key what `args` are compiled for. Returns all pointers' bits, or 1 where there is another kind of argument."""
    bits = 0
    for arg in args:
        kind = type(arg)
        if kind is int:
            key.append(arg)
        elif kind is _Tensor or kind is _Parameter:
            bits |= arg.data_ptr()
            key.append(arg.dtype)
        elif kind is float or arg is None:  # compiled for every number
            key.append(kind)
        elif isinstance(arg, tuple):
            key += kind, len(arg)
            bits |= _add(key, arg)
        elif kind.__name__ == "TensorDescriptor":  # which refuses pointers that are not aligned
            key += kind, arg.base.dtype, *arg.block_shape
        else:
            return 1
    return bits
