"""Calls of ops on a driver that runs nothing (bench/pretended_driver.py), plain and made again by replay.py: prints what reached
Triton's launcher, as JSON, with the name of the memory in the place of every pointer. Run by test_replay.py in a process of its
own, which interprets nothing.

    python replayed_calls.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

assert not os.environ.get("TRITON_INTERPRET"), "the interpreter launches nothing"

import sparsefeat_kernels as kernels  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from sparsefeat_kernels import dispatch, replay  # noqa: E402
from sparsefeat_kernels.dispatch import ops  # noqa: E402
from sparsefeat_kernels.encode.gpu import tiles  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from bench.pretended_driver import pretend  # noqa: E402

HALF = torch.bfloat16
Call = tuple[Callable[..., Any], tuple[Any, ...]]  # an op, and its arguments


def encoder(rows: int, d: int, n: int, dtype: torch.dtype = HALF) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(size, dtype=dtype) for size in ((rows, d), (n, d), (n,), (d,)))


def code(rows: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(rows, k), torch.zeros(rows, k, dtype=torch.int32)


def heads(*size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=HALF)


def cross(n: int, d: int = 64, heads_of: int = 8) -> tuple[torch.Tensor, ...]:
    return heads(2, heads_of, n, d), heads(2, heads_of, 77, d), heads(2, heads_of, 77, d)


def calls() -> dict[str, Callable[[], Call]]:
    """Each makes an op's arguments anew."""
    dictionary = 2048

    def map_of(n: int, output: bool) -> Call:
        query, key, value = cross(n)
        more = (0.1, None, None, torch.arange(2), None)
        maps = torch.zeros(2, n, 77)
        return (ops.attention_with_map_, (maps, query, key, value, *more)) if output else (
            ops.attention_map_, (maps, query, key, *more)
        )  # fmt: skip

    def tap() -> Call:
        query = heads(1, 4, 512, 64)
        return ops.attention_tap_, (
            torch.zeros(1, 512, 8), query, heads(1, 4, 8, 64), torch.zeros(1, 4, 512), 0.1, None, None, torch.arange(1)
        )  # fmt: skip

    def edit(one: torch.Tensor | None = None) -> Call:
        rule = (one,) * 5 if one is not None else tuple(torch.zeros(4) for _ in range(5))
        n = len(rule[0])
        return ops.sparse_edit, (
            heads(64, 64), *code(64, 8), torch.arange(n), heads(n, 64), *rule, torch.ones(64)
        )  # fmt: skip

    return {
        "topk_encode": lambda: (ops.topk_encode, (*encoder(256, 64, dictionary), 8, "relu", None)),
        "topk_encode, bias kept": lambda: (
            ops.topk_encode, (*encoder(256, 64, dictionary), 8, "relu", torch.zeros(dictionary)),
        ),
        "topk_encode, no descriptors": lambda: (ops.topk_encode, (*encoder(33, 37, 300), 4, "signed", None)),
        "topk_encode, more rows than are taken together": lambda: (
            ops.topk_encode, (*encoder(20_000, 16, dictionary), 8, "relu", None),
        ),
        "topk_encode, chunks": lambda: (ops.topk_encode, (*encoder(4096, 16, 32768), 8, "raw", None)),
        "threshold_encode": lambda: (
            ops.threshold_encode, (*encoder(256, 64, dictionary), torch.zeros(dictionary), 64),
        ),
        "threshold_encode, of half precision": lambda: (
            ops.threshold_encode, (*encoder(256, 64, dictionary), torch.zeros(dictionary, dtype=HALF), 64),
        ),
        "sparse_decode": lambda: (ops.sparse_decode, (*code(64, 8), heads(dictionary, 64), heads(64))),
        "sparse_decode's gradient": lambda: (
            ops.sparse_decode_grad_values, (heads(64, 64), *code(64, 8), heads(dictionary, 64)),
        ),
        "sparse_edit": edit,
        "sparse_edit, of one object five times": lambda: edit(torch.zeros(3)),
        "attention_map": lambda: map_of(4096, False),
        "attention_map and output": lambda: map_of(4096, True),
        "attention_map, heads shared out": lambda: map_of(64, True),
        "attention_tap": tap,
    }  # fmt: skip


class Allocated(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[int, int] = {}  # by pointer
        self.held: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "empty" in func._schema.name:
            self.bytes[found.data_ptr()] = found.untyped_storage().nbytes()
        self.held.append(found)
        return found


class Seen:
    """What reaches Triton's launchers, which run nothing."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        launcher = triton.runtime.driver.active.launcher_cls
        call = launcher.__call__

        def seen(own: Any, x: int, y: int, z: int, stream: int, function: int, *args: Any) -> None:
            self.launches.append(((x, y, z), stream, function, args[4:]))
            call(own, x, y, z, stream, function, *args)

        launcher.__call__ = seen

    def of(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        self.launches.clear()
        result = run(*args)
        return result, list(self.launches)


class Named:
    """Names of memory: an argument's or a result's, with the bytes from its beginning, or the number of another."""

    def __init__(self, args: tuple[Any, ...], result: Any):
        results = result if isinstance(result, tuple) else (result,)
        self.known = [
            (f"{what} {i}", t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
            for what, of in (("argument", args), ("result", results))
            for i, t in enumerate(of)
            if isinstance(t, torch.Tensor)
        ]
        self.others: list[int] = []

    def __call__(self, pointer: int) -> str:
        for name, first, size in self.known:
            if first <= pointer < first + size:
                return f"{name} + {pointer - first}"
        if pointer not in self.others:
            self.others.append(pointer)
        return f"scratch {self.others.index(pointer)}"

    def told(self, argument: Any, is_pointer: bool = False) -> Any:
        if isinstance(argument, torch.Tensor):
            return self(argument.data_ptr())
        if isinstance(argument, tuple):
            return [self.told(inner) for inner in argument]
        if isinstance(argument, int) and argument > 1 << 40:  # no number of these calls is as large as an address
            return self(argument)
        if isinstance(argument, (int, float, bool, str, type(None))):
            return argument
        rest = {name: str(value) for name, value in vars(argument).items() if name != "base"}
        return [self(argument.base.data_ptr()), rest]

    def launches(self, found: list[Any]) -> list[Any]:
        return [[grid, stream, function, [self.told(a) for a in args]] for grid, stream, function, args in found]


def layout(result: Any) -> list[Any]:
    of = result if isinstance(result, tuple) else () if result is None else (result,)
    return [[list(t.shape), list(t.stride()), str(t.dtype)] for t in of]


def main(folder: Path) -> None:
    assert pretend(folder)
    dispatch.INTERPRETED = True  # a CPU's tensors take the launchers too
    tiles.multiprocessors = lambda _: 132
    seen, found = Seen(), {}
    allocated: list[Allocated] = []

    def plainly(own: Any, *args: Any) -> Any:
        allocated.append(Allocated())
        with allocated[-1]:
            return own.run(*args)

    made: list[replay.Replayed] = []
    record = replay.Replayed._record

    def counted(own: Any, *args: Any) -> Any:
        made.append(own)
        return record(own, *args)

    replay.Replayed._record = counted
    with kernels.force_triton():
        for name, make in calls().items():
            op, args = make()
            kept = [make()[1] for _ in range(2)]  # so that no later one has their memory
            with patch.object(replay.Replayed, "__call__", plainly):
                seen.of(op, kept[0])  # compiles
                allocated.clear()
                result, launches = seen.of(op, args)
            of = Named(args, result)
            made_by = {first: size for by in allocated for first, size in by.bytes.items()}
            plain_of = of
            wanted = {"launches": of.launches(launches), "results": layout(result)}
            before = len(made)
            # The first time, and recorded; a part of an op only after the whole was tried.
            for given in (kept[0], *replay.TRIES * [kept[1]], kept[1]):
                seen.of(op, given)
            recorded = made[before:]
            result, launches = seen.of(op, args)
            of = Named(args, result)
            case = {"launches": of.launches(launches), "results": layout(result)}
            found[name] = {
                "plain": wanted,
                "replayed": case,
                "recorded": [type(own.kept[key]).__name__ for own in recorded for key in list(own.kept)[-1:]],
                "scratch": [
                    [pointer, made_by[first]]
                    for pointer, first in zip(of.others, plain_of.others, strict=True)
                    if first in made_by  # not what torch converted before
                ],
            }
    print(json.dumps({"cases": found, "rest": rest(seen)}))


def counted_records(call: Callable[[], Any]) -> int:
    """Recorded calls that run."""
    found: list[Any] = []
    run = replay._Recorded.run

    def counted(own: Any, *args: Any) -> Any:
        found.append(own)
        return run(own, *args)

    with patch.object(replay._Recorded, "run", counted):
        call()
    return len(found)


def rest(seen: Seen) -> dict[str, Any]:
    """What is not made again."""
    found: dict[str, Any] = {}
    ran: list[Any] = []

    def doubled(x: torch.Tensor) -> torch.Tensor:
        ran.append(x)
        return x * 2

    own = replay.Replayed(doubled, lambda: ())
    answers = [own(torch.full((4,), float(i))).tolist() for i in range(4)]
    found["another op"] = [answers, len(ran), list(own.kept.values())]

    def asked(x: torch.Tensor) -> torch.Tensor:
        return x.new_empty(int(x.sum()))

    own = replay.Replayed(asked, tuple)
    found["a number"] = [list(own(torch.full((4,), float(i))).shape) for i in range(4)]

    def twice_as_long(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            part = (x.repeat(2) + 1)[: len(x)]
            weak.append(weakref.ref(part))
            alive.append(sum(one() is not None for one in weak))
        return part

    weak: list[Any] = []
    alive: list[int] = []
    own = replay.Replayed(twice_as_long, tuple)
    for _ in range(3):
        weak.clear()
        own(torch.ones(3))
    found["alive"] = alive
    threshold, given = calls()["threshold_encode"]()
    with kernels.force_triton(), torch.inference_mode():
        for _ in range(3):
            threshold(*given)
        found["in inference mode"] = counted_records(lambda: threshold(*given))
    op, make = ops.sparse_decode, calls()["sparse_decode"]
    with kernels.force_triton():
        twice = make()[1]
        same = (*twice[:2], twice[2], twice[2][0])  # a view of an argument is memory of two
        found["views"] = [len(seen.of(op, same)[1]) for _ in range(4)]
        _, args = make()
        for _ in range(3):
            seen.of(op, args)
        hooked: list[str] = []
        triton.knobs.runtime.launch_enter_hook.add(lambda metadata: hooked.append(metadata.get()["name"]))
        seen.of(op, args)
        triton.knobs.runtime.launch_enter_hook.calls.clear()
        found["a hook"] = hooked
        with patch.object(triton.runtime.driver.active, "get_current_stream", lambda *_: 77):
            found["another stream"] = [launch[1] for launch in seen.of(op, args)[1]]
        x = args[2]
        gone = weakref.ref(x)
        del x, args, twice, same
        seen.launches.clear()
        found["memory is kept"] = gone() is not None
        with patch.object(replay, "MOST_KEPT", 3):
            own = replay.Replayed(lambda x: x.new_empty(1), lambda: ())
            for rows in range(20):
                own(torch.zeros(rows))
        found["kept"] = len(own.kept)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
