"""One way to measure everything: who computes the same thing how fast, in how much memory, and how near to the limit.

A `Figure` is one op at one shape, a `Provider` one program that computes it. `measure(figure)`

1. builds the inputs and hands them to every provider (`prepare`, not timed: weights in the provider's own layout);
2. runs each once and compares its answer with the figure's reference. A wrong answer gets `checked: false` and no time;
3. warms up, then lets the providers take turns in one process: each round times every provider once, in another order,
   so that a machine that slows down slows all of them, and nobody always finds the caches as the same one left them;
4. reports medians, 20th and 80th percentiles, ratios (the median over rounds of the other's time over this one's: above
   1, this one is faster), peak memory and the share of the machine's measured ceiling.

On a GPU: CUDA events, and as many sets of inputs in turn as exceed the L2 cache twice. On a CPU: `perf_counter`, and
the peak memory of ours, dense PyTorch and the fastest other from fresh processes, which build the figure again from its
`recipe`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import tuning_table

from sparsefeat.measure.machine import device_name, versions_of
from sparsefeat.whole import write_json

OURS = "sparsefeat"
DENSE = "dense PyTorch"
MAX_ROUNDS = 30
WARM_UPS = 2  # calls after the checked one,
SLOW_MS = 300.0  # of a call that is not slow; a slow one is warm after one more
NEARLY = 10.0  # times the fastest's time
SHORTEST_MS = 1.0  # a turn repeats its call until it lasts this long: clocks and events are some microseconds coarse
MAX_INPUT_SETS = 8
PEAK_LIMIT_S = 60.0


def same(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Provider:
    """A program that computes a figure: `run(prepare(inputs))` is its answer, `canonical` makes it comparable (untimed).

    A `bound` is no peer but a part of the work that cannot be avoided, such as the matrix product alone: it brings its
    own `check`, and ratios to it say how much the rest costs.

    forget(state): drops what one call keeps for the next, so that it counts when the memory of a call is taken.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[Any], Any] = same
    canonical: Callable[[Any, Any], Any] = lambda state, answer: answer
    check: Callable[[Any, Any], str] | None = None
    bound: bool = False
    note: str = ""
    forget: Callable[[Any], Any] = same


@dataclass(frozen=True)
class Figure:
    """One op at one shape. `check(inputs, answer)` says what is wrong with an answer, or "". flops and bytes: formulas.

    recipe: (module, function, arguments) with which a fresh process builds this figure again, for peak memory.
    absent: programs that belong here and could not be run, with the reason.
    """

    op: str
    shape: Mapping[str, int]
    dtype: str
    device: str
    inputs: Callable[[int], Any]
    providers: Sequence[Provider]
    check: Callable[[Any, Any], str]
    flops: float
    bytes: float
    input_bytes: int = 0
    gradients: bool = False
    absent: Mapping[str, str] = field(default_factory=dict)
    recipe: tuple[str, str, Mapping[str, Any]] | None = None

    @property
    def key(self) -> str:
        return f"{self.op} {' '.join(f'{k}={v}' for k, v in self.shape.items())} {self.dtype}"


# ------------------------------------------------------------------------------------------------------------- machine


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached: bytes a second of a large copy (read and written), FLOPs a second of a square product."""

    copy: float
    product: Mapping[str, float]

    def floor_ms(self, flops: float, bytes: float, dtype: str) -> float:
        """The time below which the work cannot be done, if the formulas count it and the ceilings hold."""
        rate = self.product.get(dtype) or self.product["float32"]
        return 1e3 * max(flops / rate, bytes / self.copy)

    def as_json(self) -> dict[str, float]:
        rates = {f"product_{dtype}_tflop_s": round(rate / 1e12, 3) for dtype, rate in self.product.items()}
        return {"copy_gb_s": round(self.copy / 1e9, 2), **rates}


def measure_ceilings(device: str, side: int | None = None, copy_bytes: int | None = None) -> Ceilings:
    """The best of a few large copies, and of a few square products in fp32 (IEEE) and bf16, on random data."""
    cuda = device == "cuda"
    side = side or (8192 if cuda else 2048)
    copy_bytes = copy_bytes or (4 << 30 if cuda else 256 << 20)

    def best(run: Callable[[Any], Any], state: Any) -> float:
        run(state)
        return min(_turn_ms(run, [state], 0, 1, device) for _ in range(5)) / 1e3

    source = torch.rand(copy_bytes // 4, device=device)
    copy = 2 * copy_bytes / best(lambda pair: pair[1].copy_(pair[0]), (source, torch.empty_like(source)))
    del source
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors = [torch.randn(side, side, device=device).to(dtype) for _ in range(2)]
        taken = best(lambda abc: torch.mm(abc[0], abc[1], out=abc[2]), (*factors, torch.empty_like(factors[0])))
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / taken
    return Ceilings(copy, rates)


VERSIONED = [
    "triton"
]  # distributions whose versions a record carries, where they are installed; bench/ adds the peers'


@cache
def source_digest() -> str:
    """Twelve digits that change with any line of the kernels: measurements of other kernels are not gone on with."""
    import sparsefeat_kernels

    digest = hashlib.sha256()
    for path in sorted(Path(sparsefeat_kernels.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def tuning_digest() -> str:
    """Twelve digits of the tuning tables that the kernels choose by; "none" without one."""
    own = os.environ.get(tuning_table.VARIABLE)
    paths = sorted(tuning_table.FOLDER.glob("*.json")) if own is None else [Path(own)] if own else []
    content = b"".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:12] if paths else "none"


def versions() -> dict[str, str]:
    """What times depend on."""
    found = {**versions_of(VERSIONED), "kernels": source_digest()}
    if torch.cuda.is_available():  # a measured table changes what runs: a user without it has other times
        found["tuning"] = tuning_digest()
    return found


# ---------------------------------------------------------------------------------------------------------------- time


def _turn_ms(run: Callable[[Any], Any], states: Sequence[Any], first: int, calls: int, device: str) -> float:
    """Milliseconds a call, over `calls` calls that go round the states from `first` on."""
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for i in range(calls):
            run(states[(first + i) % len(states)])
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / calls
    began = time.perf_counter()
    for i in range(calls):
        run(states[(first + i) % len(states)])
    return 1e3 * (time.perf_counter() - began) / calls


def percentile(times: Sequence[float], share: float) -> float:
    """Linear between the two nearest: the median is `percentile(times, 0.5)`."""
    ordered = sorted(times)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def input_sets(figure: Figure) -> int:
    """How many sets of inputs to take in turn, so that none is in the L2 cache of a GPU when its turn comes."""
    if figure.device != "cuda":
        return 1
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MAX_INPUT_SETS, math.ceil(2 * cache_bytes / max(figure.input_bytes, 1)) + 1))


# -------------------------------------------------------------------------------------------------------------- memory


def _cuda_peak(run: Callable[[Any], Any], state: Any) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(state)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _resident(label: str) -> int:
    """VmRSS (now) or VmHWM (the largest since it was last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(label):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {label}")


def resident_growth(run: Callable[[], object], forget: Callable[[], object] = lambda: None) -> int:
    """`resident_peak_beyond` after one call, so that what a library sets up once does not count, but what a call keeps
    for the next, and `forget` drops, does."""
    run()
    forget()
    return resident_peak_beyond(run)


def resident_peak_beyond(run: Callable[[], object]) -> int:
    """By how many bytes `run` raised this process's resident memory at its highest, results and library scratch
    included. Free heap is given back first, so that no call can hide in memory that an earlier one left."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from here
        before = _resident("VmRSS")
        run()
        return max(0, _resident("VmHWM") - before)
    except (OSError, AttributeError):  # not Linux: the largest ever, which the inputs may already have reached
        import resource

        unit = 1 if platform.system() == "Darwin" else 1024
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _peak_in_child(connection: Any, recipe: tuple[str, str, Mapping[str, Any]], name: str, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        module, function, arguments = recipe
        figure: Figure = getattr(import_module(module), function)(**arguments)
        provider = next(p for p in figure.providers if p.name == name)
        with torch.set_grad_enabled(figure.gradients):
            state = provider.prepare(figure.inputs(0))
            connection.send(resident_growth(lambda: provider.run(state), lambda: provider.forget(state)))
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")


def fresh_peak(figure: Figure, provider: Provider) -> int | None:
    """Peak memory of one call in a process that did nothing before; None where that process failed."""
    if figure.recipe is None:
        return None
    # A server that has imported torch and the adapters, and computed nothing, forks every child: no seconds of imports.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([figure.recipe[0]])
    receive, send = context.Pipe(duplex=False)
    arguments = (send, figure.recipe, provider.name, torch.get_num_threads())
    child = context.Process(target=_peak_in_child, args=arguments, daemon=True)
    child.start()
    send.close()
    try:
        answer = receive.recv() if receive.poll(PEAK_LIMIT_S) else None
    except EOFError:  # killed, for want of memory
        answer = None
    child.kill()
    child.join()
    return answer if isinstance(answer, int) else None


# ------------------------------------------------------------------------------------------------------------- measure


def measure(
    figure: Figure, ceilings: Ceilings, seconds: float = 10.0, min_rounds: int = 3, peaks: bool = True
) -> list[dict[str, Any]]:
    """One record a provider, in the figure's order; `seconds` is for the rounds alone. See the top of the file."""
    if figure.device == "cuda":
        torch.cuda.empty_cache()
    with torch.set_grad_enabled(figure.gradients):
        sets = [figure.inputs(seed) for seed in range(input_sets(figure))]
        states: dict[str, list[Any]] = {}
        faults: dict[str, str] = {}
        for provider in figure.providers:
            states[provider.name], faults[provider.name] = _checked_states(figure, provider, sets)
        right = [provider for provider in figure.providers if not faults[provider.name]]
        times = _rounds(right, states, figure.device, seconds, min_rounds)
        memory: dict[str, int | None] = {}
        for provider in right if peaks else ():
            if figure.device == "cuda":
                memory[provider.name] = _cuda_peak(provider.run, states[provider.name][0])
        states.clear()
        del sets
        for provider in _weighed(right, times) if peaks and figure.device != "cuda" else ():
            memory[provider.name] = fresh_peak(figure, provider)
    return [
        _record(figure, provider, times, memory.get(provider.name), faults[provider.name], ceilings)
        for provider in figure.providers
    ]


def _weighed(providers: Sequence[Provider], times: Mapping[str, Sequence[float]]) -> list[Provider]:
    """Those whose memory is worth the seconds of a fresh process each: ours, dense PyTorch, the fastest of the others."""
    others = [p for p in providers if not p.name.startswith(OURS) and p.name != DENSE and not p.bound]
    fastest = min(others, key=lambda p: percentile(times[p.name], 0.5), default=None)
    return [p for p in providers if p.name.startswith(OURS) or p.name == DENSE or p is fastest]


def _checked_states(figure: Figure, provider: Provider, sets: Sequence[Any]) -> tuple[list[Any], str]:
    """What the provider runs on, and what is wrong with its answer ("": nothing)."""
    try:
        states = [provider.prepare(inputs) for inputs in sets]
        answer = provider.canonical(states[0], provider.run(states[0]))
        return states, (provider.check or figure.check)(sets[0], answer)
    except Exception as error:  # a peer may fail in any way: that is a result, not the end of the run
        if figure.device == "cuda" and isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return [], f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def _rounds(
    providers: Sequence[Provider], states: Mapping[str, list[Any]], device: str, seconds: float, min_rounds: int
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {provider.name: [] for provider in providers}
    if not providers:
        return times
    once: dict[str, float] = {}
    for provider in providers:
        for _ in range(WARM_UPS):
            once[provider.name] = max(_turn_ms(provider.run, states[provider.name], 0, 1, device), 1e-4)
            if once[provider.name] > SLOW_MS:
                break
    fastest = min(
        once.values()
    )  # who is nearly as fast makes as many calls: the first finds colder caches than the others
    calls = {
        name: math.ceil(SHORTEST_MS / (fastest if took < NEARLY * fastest else took)) for name, took in once.items()
    }
    deadline = time.perf_counter() + seconds
    for turn in range(MAX_ROUNDS):
        if turn >= min_rounds and time.perf_counter() > deadline:
            break
        for provider in random.Random(turn).sample(providers, len(providers)):
            own = states[provider.name]
            times[provider.name].append(_turn_ms(provider.run, own, turn, calls[provider.name], device))
    return times


def _record(
    figure: Figure,
    provider: Provider,
    times: Mapping[str, Sequence[float]],
    peak: int | None,
    fault: str,
    ceilings: Ceilings,
) -> dict[str, Any]:
    own = times.get(provider.name, ())
    median = percentile(own, 0.5) if own else None
    return {
        "op": figure.op,
        "shape": dict(figure.shape),
        "dtype": figure.dtype,
        "provider": provider.name,
        "bound": provider.bound,
        "checked": not fault,
        "fault": fault,
        "note": provider.note,
        "median_ms": median,
        "p20_ms": percentile(own, 0.2) if own else None,
        "p80_ms": percentile(own, 0.8) if own else None,
        "rounds": len(own),
        "peak_bytes": peak,
        "flops": figure.flops,
        "bytes": figure.bytes,
        "ceiling_share": ceilings.floor_ms(figure.flops, figure.bytes, figure.dtype) / median if median else None,
        "ceilings": ceilings.as_json(),
        "ratio": {
            other: statistics.median(b / a for a, b in zip(own, theirs, strict=True))
            for other, theirs in times.items()
            if own and other != provider.name
        },
        "absent": dict(figure.absent),
        "device": device_name(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }


def with_providers(figure: Figure, *names: str) -> Figure:
    """The figure with only these providers, in this order."""
    by_name = {provider.name: provider for provider in figure.providers}
    return replace(figure, providers=tuple(by_name[name] for name in names if name in by_name))


# ------------------------------------------------------------------------------------------------------------- results


class Results:
    """The records of one device in one JSON file, written whole after each figure: a run that is killed can go on."""

    def __init__(self, path: Path, start_over: bool = False, command: str = "make bench"):
        self.path = path
        self.command = command
        self.records: list[dict[str, Any]] = []
        self.not_installed: dict[str, str] = {}
        if path.is_file() and not start_over:
            kept = json.loads(path.read_text())
            self.records, self.not_installed = kept["records"], kept.get("not_installed", {})

    def has(self, figure: Figure) -> bool:
        """Whether every provider of the figure was measured already, with the versions of now."""
        now = versions()
        found = {r["provider"] for r in self.records if key_of(r) == figure.key and r["versions"] == now}
        return {provider.name for provider in figure.providers} <= found

    def add(self, figure: Figure, records: Sequence[dict[str, Any]]) -> None:
        self.records = [r for r in self.records if key_of(r) != figure.key] + list(records)
        self.write()

    def write(self) -> None:
        content = {
            "device": device_name(),
            "date": max((r["date"] for r in self.records), default=date.today().isoformat()),
            "command": self.command,
            "not_installed": self.not_installed,
            "records": self.records,
        }
        write_json(self.path, content)


def key_of(record: Mapping[str, Any]) -> str:
    """`Figure.key` of a record."""
    return f"{record['op']} {' '.join(f'{k}={v}' for k, v in record['shape'].items())} {record['dtype']}"
