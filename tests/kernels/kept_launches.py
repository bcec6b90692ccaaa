"""Launches of one kernel on a driver that runs nothing (bench/pretended_driver.py), by Triton's own way and by launch.py's:
prints what reached Triton's launcher in C, as JSON. Run by test_launch.py in a process of its own, which interprets nothing.

    python kept_launches.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

assert not os.environ.get("TRITON_INTERPRET"), "the interpreter launches nothing"

import torch  # noqa: E402
import triton  # noqa: E402
from sparsefeat_kernels import launch  # noqa: E402
from sparsefeat_kernels.dispatch import jit, tensor_descriptor, tl  # noqa: E402

from bench.pretended_driver import pretend  # noqa: E402


class Rows(NamedTuple):
    ptr: Any
    stride: Any


@jit
def _copy_kernel(x, y_ptr, other_ptr, n, scale, DESCRIBED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if DESCRIBED:
        value = tl.reshape(x.load([0, 0]), [BLOCK])
    else:
        value = tl.load(x.ptr + at * x.stride, mask=at < n)
    if other_ptr is not None:
        value += tl.load(other_ptr + at)
    tl.store(y_ptr + at, value * scale, mask=at < n)


MEMORY = torch.zeros(4096)
Y = torch.zeros(4096)


def arguments(**changes: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    given = {"x": Rows(MEMORY, 1), "y": Y, "other": None, "n": 16, "scale": 2.0, "DESCRIBED": False, "BLOCK": 64}
    given |= changes
    positional = tuple(given[name] for name in ("x", "y", "other", "n", "scale"))
    return positional, {"DESCRIBED": given["DESCRIBED"], "BLOCK": given["BLOCK"], "num_warps": given.get("warps", 4)}


def described(dtype: torch.dtype, block: int) -> Any:
    return tensor_descriptor(torch.zeros(64, 64, dtype=dtype), [1, block])


# What Triton compiles another kernel for, or need not; each beside the first.
CASES = {
    "as it is": {},
    "another number": {"n": 32},
    "one": {"n": 1},
    "not divisible": {"n": 17},
    "of 64 bits": {"n": 1 << 31},
    "negative": {"n": -16},
    "another factor": {"scale": 3.0},
    "a factor of one": {"scale": 1.0},
    "other memory": {"y": torch.zeros(4096)},
    "another dtype": {"y": Y.half()},
    "a pointer that is not aligned": {"y": Y[1:]},
    "a pointer in a tuple that is not aligned": {"x": Rows(MEMORY[3:], 1)},
    "another number in a tuple": {"x": Rows(MEMORY, 16)},
    "a tensor in the place of None": {"other": MEMORY},
    "a parameter": {"other": torch.nn.Parameter(MEMORY)},
    "another constant": {"BLOCK": 128},
    "other warps": {"warps": 8},
    "a descriptor": {"x": described(torch.float32, 64), "DESCRIBED": True},
    "a descriptor of another dtype": {"x": described(torch.bfloat16, 64), "DESCRIBED": True},
    "a descriptor of other blocks": {"x": described(torch.float32, 128), "DESCRIBED": True, "BLOCK": 128},
}


class Seen:
    """What reached Triton: calls of its way through Python, and of its launcher."""

    def __init__(self) -> None:
        self.through_python, self.launches = 0, []
        compiled, launcher = triton.compiler.CompiledKernel, triton.runtime.driver.active.launcher_cls
        metadata, call = compiled.launch_metadata, launcher.__call__

        def counted(own: Any, *args: Any) -> Any:  # which Triton's way alone asks for
            self.through_python += 1
            return metadata(own, *args)

        def seen(own: Any, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
            given = [
                told(arg) for arg in args[4:]
            ]  # metadata of the kernel and of the launch, and two hooks, come first
            self.launches.append({"grid": [x, y, z], "stream": stream, "function": function, "arguments": given})
            call(own, x, y, z, stream, function, *args)

        compiled.launch_metadata, launcher.__call__ = counted, seen

    def __call__(self, kernel: Any, grid: tuple[int, ...], changes: dict[str, Any]) -> dict[str, Any]:
        """The launch, and whether it took Triton's way."""
        positional, options = arguments(**changes)
        before = self.through_python
        kernel[grid](*positional, **options)
        return self.launches.pop() | {"through_python": self.through_python - before}


def told(argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return f"{argument.dtype} at {argument.data_ptr()}"
    if isinstance(argument, tuple):
        return [told(inner) for inner in argument]
    return argument if isinstance(argument, (int, float, bool, str, type(None))) else f"{argument.base.data_ptr()}"


@contextmanager
def instead(of: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(of, name)
    setattr(of, name, value)
    try:
        yield
    finally:
        setattr(of, name, before)


def main(folder: Path) -> None:
    assert pretend(folder)
    driver, runtime = triton.runtime.driver.active, triton.knobs.runtime
    seen = Seen()
    own = _copy_kernel._kernel()
    run = triton.runtime.jit.JITFunction.run
    with instead(triton.runtime.jit.JITFunction, "run", lambda *args, **options: run(*args, **options)):
        replaced = [seen(_copy_kernel, (1,), {}) for _ in range(2)]
    found: dict[str, Any] = {"version": list(map(int, triton.__version__.split(".")[:2])), "known": launch.KNOWN}
    found["another in its place"] = replaced
    found["cases"] = {
        name: {
            "ours": [seen(_copy_kernel, (2, 3), changes) for _ in range(3)],
            "triton": seen(own, (2, 3), changes),
        }
        for name, changes in CASES.items()
    }
    with instead(driver, "get_current_stream", lambda *_: 77):
        found["another stream"] = seen(_copy_kernel, (1,), {})
    with instead(driver, "get_current_device", lambda *_: 1):
        found["another device"] = [seen(_copy_kernel, (1,), {}) for _ in range(2)]
    hooked: list[str] = []
    runtime.launch_enter_hook.add(lambda metadata: hooked.append(metadata.get()["name"]))
    found["a hook"] = seen(_copy_kernel, (1,), {})
    runtime.launch_enter_hook.calls.clear()
    with instead(runtime, "launch_exit_hook", lambda metadata: hooked.append("the end")):
        found["one hook"] = seen(_copy_kernel, (1,), {})
    found["hooked"] = hooked
    with instead(runtime, "debug", True):
        found["debugging"] = seen(_copy_kernel, (1,), {})
    with instead(launch, "KNOWN", ()):
        launch.known_triton.cache_clear()
        unknown = launch.Launcher(own)
    launch.known_triton.cache_clear()
    other = {"__getitem__": lambda _, grid: lambda *args, **options: unknown(grid, args, options)}
    found["an unknown version"] = [seen(type("Kernel", (), other)(), (1,), {}) for _ in range(2)]
    with instead(launch, "MOST_KEPT", 5):
        for n in range(2, 40):
            seen(_copy_kernel, (1,), {"n": n})
    found["kept"] = len(_copy_kernel.launcher.kept)
    found["after all"] = [seen(_copy_kernel, (1,), {}) for _ in range(2)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
