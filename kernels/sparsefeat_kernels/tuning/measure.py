"""Measure a tuning table on this machine's GPU: `python -m sparsefeat_kernels.tuning --out FILE`.

At each published shape every configuration of an op is checked against fp64, then all that were right are timed in turns, as
replays of a CUDA graph between flushes of the L2 cache; the fastest becomes the shape's entry. The most wanted shapes come
first, the file is complete after each, and `--seconds` ends the run between two shapes. To use the table: set
SPARSEFEAT_TUNING=FILE, or put it into tuning/tables/ (see tuning_table.py).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..decode.sparse_decode import sparse_decode_triton
from ..dispatch import backend
from ..encode.gpu.topk import selects, topk_encode_triton
from ..tuning_table import Entry, Table
from .graphs import captured

__all__ = ["OPS", "Shape", "configurations", "main", "tune"]

OPS = ("topk_encode", "sparse_decode")
# d, n_latents, k of published SAEs, the most wanted first
SAES: Mapping[str, tuple[int, int, int]] = {
    "SAeUron": (1280, 20480, 32),
    "FLUX": (3072, 65536, 64),
    "sdxl-unbox, k 10": (1280, 5120, 10),
    "Concept Steerers, SD 1.5": (768, 32768, 64),
    "Concept Steerers, SDXL": (2048, 32768, 64),
    "Concept Steerers, SD 1.4": (768, 3072, 32),
    "Concept Steerers, FLUX": (4096, 65536, 64),
    "ItD": (768, 524288, 64),
    "sdxl-unbox, k 160": (1280, 5120, 160),
    "TIDE": (1152, 18432, 922),
}
ROWS = (4096, 256)
FULL = ("SAeUron", "Concept Steerers, SD 1.5")  # also measured in float32

# Products: rows, latents, columns, warps, stages. The first of each is the default, the second of half precision that of sm_90.
# The others trade shared memory for a deeper pipeline, and a tile's size for more programs at once (64 high).
PRODUCTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "bfloat16": (
        (128, 128, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 128, 64, 4, 3),
        (64, 256, 64, 4, 4),
    ),
    "float32": ((64, 128, 32, 8, 2), (128, 128, 32, 8, 3), (64, 64, 32, 4, 3)),
}
DECODES = ((4, 512, 4), (4, 256, 2), (8, 512, 4), (4, 1024, 8), (8, 256, 4))  # BLOCK_K, BLOCK_D, warps

CHECKED_ROWS = 16
WARMUPS = 2
LEAST_ROUNDS, SHAPE_SECONDS = 7, 0.8  # of timing: rounds in turns until both
FLUSH_BYTES = 256 << 20  # written before every timed call: no cache keeps what it read


@dataclass(frozen=True)
class Shape:
    rows: int
    d: int
    n_latents: int
    k: int
    dtype: str


@dataclass(frozen=True)
class Configuration:
    design: str
    blocks: Mapping[str, int]


def shapes() -> Iterator[Shape]:
    """The published shapes, in the order in which they are measured."""
    for rows in ROWS:
        for d, n_latents, k in SAES.values():
            yield Shape(rows, d, n_latents, k, "bfloat16")
    for name in FULL:
        yield Shape(ROWS[0], *SAES[name], "float32")


def configurations(op: str, shape: Shape) -> list[Configuration]:
    """What is measured at a shape, the default first."""
    if op == "sparse_decode":
        of_decode = ("BLOCK_K", "BLOCK_D", "num_warps")
        return [Configuration("A", dict(zip(of_decode, sizes, strict=True))) for sizes in DECODES]
    names = ("BLOCK_ROWS", "BLOCK_LATENTS", "BLOCK_D", "num_warps", "num_stages")
    if not selects(shape.n_latents, shape.k):  # plain torch
        return []
    return [Configuration("A", dict(zip(names, sizes, strict=True))) for sizes in PRODUCTS[shape.dtype]]


# --------------------------------------------------------------------------------------------------- inputs and answers


def inputs_of(shape: Shape, device: str) -> dict[str, Tensor]:
    """Random rows, unit encoder rows and a code of k distinct latents a row."""
    g = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    W = normal(shape.n_latents, shape.d)
    W /= W.norm(dim=1, keepdim=True)
    stretch = shape.n_latents // shape.k
    indices = torch.randint(stretch, (shape.rows, shape.k), generator=g, device=device)
    indices += torch.arange(shape.k, device=device) * stretch
    found = {
        "x": normal(shape.rows, shape.d), "W": W, "b_enc": 0.1 * normal(shape.n_latents), "b_pre": 0.1 * normal(shape.d)
    }  # fmt: skip
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    return found | {"values": normal(shape.rows, shape.k).abs(), "indices": indices.int()}


def inputs_without_data(shape: Shape) -> dict[str, Tensor]:
    """`inputs_of` on the meta device: enough to compile for."""
    dtype, code = getattr(torch, shape.dtype), (shape.rows, shape.k)
    sizes = {"x": (shape.rows, shape.d), "W": (shape.n_latents, shape.d), "b_enc": shape.n_latents, "b_pre": shape.d}
    found = {name: torch.empty(size, dtype=dtype, device="meta") for name, size in sizes.items()}
    indices = torch.empty(code, dtype=torch.int32, device="meta")
    return found | {"values": torch.empty(code, device="meta"), "indices": indices}


def call_of(op: str, shape: Shape, inputs: Mapping[str, Tensor], found: Configuration) -> Callable[[], Any]:
    x, W, b_enc, b_pre = (inputs[name] for name in ("x", "W", "b_enc", "b_pre"))
    if op == "sparse_decode":
        return lambda: sparse_decode_triton(inputs["values"], inputs["indices"], W, b_pre, blocks=found.blocks)
    return lambda: topk_encode_triton(x, W, b_enc, b_pre, shape.k, "relu", blocks=found.blocks)


def fault_of(op: str, shape: Shape, inputs: Mapping[str, Tensor], answer: Any) -> str:
    """What is wrong with an answer, from fp64 and the rounding bound of a sum in fp32; "" if nothing is."""
    some = torch.linspace(0, shape.rows - 1, min(shape.rows, CHECKED_ROWS)).round().long().unique()
    W, b_enc, b_pre = inputs["W"], inputs["b_enc"].double(), inputs["b_pre"].double()
    if op == "sparse_decode":
        values, indices = inputs["values"][some].double(), inputs["indices"][some].long()
        wanted = (values[:, None] @ W[indices].double())[:, 0] + b_pre
        size = (values[:, None] @ W[indices].double().abs())[:, 0] + b_pre.abs()
        allowed = size * (shape.k + 4) * 2.0**-24 + wanted.abs() * torch.finfo(W.dtype).eps
        return "" if bool(((answer[some].double() - wanted).abs() <= allowed).all()) else "a value is wrong"
    values, indices = answer[0][some].double(), answer[1][some].long()
    x = inputs["x"][some].double()
    # By latents, so that fp64 copies stay small.
    tiles = [
        ((x - b_pre) @ w.double().T, (x.abs() + b_pre.abs()) @ w.double().abs().T) for w in W.split(1 << 14)
    ]  # fmt: skip
    a = torch.cat([product for product, _ in tiles], 1) + b_enc
    size = torch.cat([size for _, size in tiles], 1) + b_enc.abs()
    allowed = (shape.d + 4) * 2.0**-24 * size.amax(1, keepdim=True)
    if bool((indices.sort(1).values.diff(dim=1) == 0).any()):
        return "a latent was chosen twice"
    chosen = a.gather(1, indices)
    if not bool(((chosen.relu() - values).abs() <= allowed).all()):
        return "a value is wrong"
    left_out = a.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    return "" if bool((left_out - chosen.amin(1, keepdim=True) <= 2 * allowed).all()) else "a latent was missed"


# -------------------------------------------------------------------------------------------------------- compilation
# A configuration takes seconds to compile and milliseconds to time: other processes compile, on the cores a GPU leaves
# idle, into the cache that Triton keeps on disk. They open no device and launch nothing.


class _Described:
    """What the compiler asks a driver for."""

    def __init__(self, target: Any) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def compile_ahead(target: tuple[str, Any, int], op: str, shape: Shape, found: Configuration) -> None:
    """Compile what `found` would run, for `target` (backend, architecture, threads of a warp). In a process of its own:
    from here on Triton launches nothing in it."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(_Described(GPUTarget(*target)))
    run = triton.runtime.jit.JITFunction.run
    if not getattr(run, "compiles_only", False):

        def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            return run(self, *args, grid=grid, warmup=True, **options)

        vars(compile_only)["compiles_only"] = True
        triton.runtime.jit.JITFunction.run = compile_only
    call_of(op, shape, inputs_without_data(shape), found)()


class _Compilers:
    """Processes that compile the configurations of every shape, in the order in which they will be measured."""

    def __init__(self, todo: list[tuple[str, Shape]]) -> None:
        import triton

        target = triton.runtime.driver.active.get_current_target()
        described = (target.backend, target.arch, target.warp_size)
        workers = max(1, min(12, (os.cpu_count() or 2) - 2))
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        self.jobs = {
            (op, shape): [
                self.pool.submit(compile_ahead, described, op, shape, found) for found in configurations(op, shape)
            ]
            for op, shape in todo
        }

    def wait(self, op: str, shape: Shape, seconds: float) -> None:
        """Until the shape's configurations are compiled. What failed fails again, and says so, when it is measured."""
        wait(self.jobs[op, shape], max(0.0, seconds))

    def stop(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------- timing


def milliseconds(run: Callable[[], Any], flush: Tensor) -> float:
    """One call, from a cold cache. On a GPU between events, which the flush leaves time to be queued."""
    flush.zero_()
    if not flush.is_cuda:
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def timed_calls(calls: Mapping[int, Callable[[], Any]], device: str) -> tuple[dict[int, Callable[[], Any]], bool]:
    """What is timed of each call, and whether these are replays of graphs: of a call that Python launches, the host's noise
    would decide. All or none: a call and a replay do not compare."""
    if device == "cuda":
        try:
            return {i: captured(run).replay for i, run in calls.items()}, True
        except Exception as error:
            print(f"timed with what the host takes: no graph of a call ({type(error).__name__}: {error})", flush=True)
    return dict(calls), False


def measure(
    op: str, shape: Shape, tried: list[Configuration], device: str, seconds: float, flush: Tensor
) -> list[dict[str, Any]]:
    """One record a configuration: design, blocks, and median_ms (`replayed`: of a graph) or the fault for which it was not
    timed."""
    inputs = inputs_of(shape, device)
    records: list[dict[str, Any]] = [{"design": one.design, "blocks": dict(one.blocks)} for one in tried]
    calls: dict[int, Callable[[], Any]] = {}
    for i, one in enumerate(tried):
        run = call_of(op, shape, inputs, one)
        try:
            fault = fault_of(op, shape, inputs, run())
            for _ in range(WARMUPS):
                run()
        except Exception as error:  # more shared memory or registers than this device has: not a choice here
            fault = f"{type(error).__name__}: {error}"[:300]
        if fault:
            records[i]["fault"] = fault
        else:
            calls[i] = run
    calls, replayed = timed_calls(calls, device)
    times: dict[int, list[float]] = {i: [] for i in calls}
    began, rounds = time.perf_counter(), 0
    while calls and (rounds < LEAST_ROUNDS or time.perf_counter() - began < seconds):
        for i, run in calls.items():
            times[i].append(milliseconds(run, flush))
        rounds += 1
    for i, found in times.items():
        records[i] |= {"median_ms": statistics.median(found), "replayed": replayed}
    return records


def entry_of(op: str, shape: Shape, records: list[dict[str, Any]]) -> Entry | None:
    """The fastest right configuration, the first of equally fast ones; None if none was right."""
    timed = [record for record in records if "median_ms" in record]
    best = min(timed, key=lambda record: record["median_ms"], default=None)
    if best is None:
        return None
    return Entry(op=op, **asdict(shape), **{name: best[name] for name in ("design", "blocks", "median_ms")})


def tune(
    out: Path,
    ops: tuple[str, ...],
    wanted: list[Shape],
    device: str,
    seconds: float,
    shape_seconds: float = SHAPE_SECONDS,
) -> Table:
    """Measure, shape by shape, and write `out` after each; what `seconds` cut off has no entry. Beside the table's own
    fields the file has `measured`, every configuration's time, and `missing`, the shapes that were not measured."""
    deadline = time.perf_counter() + seconds  # before which a shape must be begun
    flush = torch.empty(FLUSH_BYTES if device == "cuda" else 16, dtype=torch.int8, device=device)
    name, capability = "CPU", (0, 0)
    if device == "cuda":
        name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    entries: list[Entry] = []
    measured: list[dict[str, Any]] = []
    todo = [(op, shape) for shape in wanted for op in ops if configurations(op, shape)]
    compilers = _Compilers(todo) if device == "cuda" and seconds > 0 else None
    while True:
        table = Table(name, capability, backend(), date.today().isoformat(), versions(), tuple(entries))
        missing = [{"op": op, **asdict(shape)} for op, shape in todo]
        temporary = out.with_name(out.name + ".tmp")
        temporary.write_text(json.dumps(table.as_json() | {"measured": measured, "missing": missing}, indent=1) + "\n")
        temporary.replace(out)
        if not todo or time.perf_counter() > deadline:
            if compilers is not None:
                compilers.stop()
            return table
        op, shape = todo.pop(0)
        if compilers is not None:
            compilers.wait(op, shape, deadline - time.perf_counter())
        records = measure(op, shape, configurations(op, shape), device, shape_seconds, flush)
        measured += [{"op": op, **asdict(shape), **record} for record in records]
        entry = entry_of(op, shape, records)
        entries += [entry] if entry is not None else []
        print(op, shape, "no configuration was right" if entry is None else describe(entry, records), flush=True)


def describe(entry: Entry, records: list[dict[str, Any]]) -> str:
    """The winner and how the designs compare."""
    best = {
        design: min((r["median_ms"] for r in records if r["design"] == design and "median_ms" in r), default=None)
        for design in sorted({record["design"] for record in records})
    }
    compared = ", ".join(f"{design} {'failed' if ms is None else f'{ms:.3f} ms'}" for design, ms in best.items())
    return f"-> {entry.design} {dict(entry.blocks)} ({compared})"


def versions() -> dict[str, str]:
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m sparsefeat_kernels.tuning", description=(__doc__ or "").partition(":")[0]
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the table, as JSON")
    parser.add_argument("--seconds", type=float, default=300.0, help="no shape is begun after so many (default 300)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("a tuning table is measured on a GPU, and torch finds none on this machine")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    table = tune(options.out, tuple(options.ops), list(shapes()), "cuda", options.seconds)
    print(f"{options.out}: {len(table.entries)} entries for {table.device}")
