"""What topk_encode, threshold_encode and attention_with_map_ should cost on an H100, from their machine code: `python -m bench.predict`. No GPU is
needed, and none has confirmed it; expect 30 % either way.

The kernels are compiled for sm_90 as their launchers would compile them for 4,096 rows of bfloat16, and each launch costs
what the busiest of the units it uses takes. The constants were fixed before the kernels were written, so that they say of
the design that was here before (its counts are in results/design-a-sass.json) 2.1, 2.9, 2.5 and 12 times the bare product.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.sass import Code, clocks

MULTIPROCESSORS = 132
CLOCK = 1.755e9
MEMORY = 3.0e12  # bytes a second
CUBLAS = 700e12  # floating-point operations a second of the bare product, at these shapes
SMALL_TILE = 575e12  # the most that a tile of 128 x 128 reaches, whose operands come from the L2 cache
LAUNCH = 2e-6
LATENCY = 4  # clocks from one instruction of a warp to the next that needs it
FETCH = 700  # clocks of a load from memory
TRIPS = 8  # of the loop that bisects, of 14 at most: an exponent and three bits
ROWS = 4096

# d, n_latents, k, and the ratio to the bare product that is asked for. Of threshold_encode k latents are active.
SHAPES = {
    "1280/20480/32": 1.3,
    "768/32768/64": 1.35,
    "3072/65536/64": 1.15,
    "768/524288/64": 1.4,
}
THRESHOLD = 1.4  # at all of them
OPS = ("topk_encode", "threshold_encode")
# batch, heads, positions, head dim, keys: SD 1.5 at 64 x 64 and 16 x 16, SDXL at 32 x 32.
MAPS = ((2, 8, 4096, 40, 77), (2, 8, 256, 160, 77), (2, 20, 1024, 64, 77))
REGISTERS = 65536  # of a multiprocessor
COMPILED = Path(__file__).resolve().parents[1] / "build" / "predict"  # what is compiled is kept there
RECORDED = Path(__file__).with_name("results") / "design-a-sass.json"


def sizes(shape: str) -> tuple[int, int, int]:
    d, n_latents, k = map(int, shape.split("/"))
    return d, n_latents, k


def bare(shape: str) -> float:
    """Seconds of the product alone."""
    d, n_latents, _ = sizes(shape)
    return 2 * ROWS * n_latents * d / CUBLAS


def waves(tiles: int, at_once: int) -> float:
    """How much longer tiles take than their work, since the last of them leave multiprocessors idle."""
    return math.ceil(tiles / at_once) * at_once / tiles


def tiles_of(rows: int, n_latents: int, height: int, width: int) -> int:
    return math.ceil(rows / height) * math.ceil(n_latents / width)


def by_rows(rows: int, warps: int, clocks_a_warp: float, instructions: float) -> float:
    """Seconds of a launch of one program a row: the work of the busiest multiprocessor, or a program's own time."""
    work = math.ceil(rows / MULTIPROCESSORS) * warps * clocks_a_warp
    return max(work, instructions * LATENCY) / CLOCK


def design_a(shape: str) -> float:
    """Times the bare product, of the design that kept pre-activations in a scratch."""
    (d, n_latents, _), counted = sizes(shape), json.loads(RECORDED.read_text())[shape]
    rows = counted["rows"]
    tiles = tiles_of(rows, n_latents, 128, 128)
    work = tiles * 2 * 128 * 128 * d / SMALL_TILE * waves(tiles, 2 * MULTIPROCESSORS)
    moved = (2 * n_latents * d + 4 * n_latents * rows) / MEMORY  # W again, and the scratch
    selection = by_rows(rows, counted["warps"], counted["clocks"], counted["instructions"])
    bias = 2 * n_latents * d / MEMORY
    total = counted["chunks"] * (max(work, moved) + selection) + bias + counted["launches"] * LAUNCH
    return total / bare(shape)


# ------------------------------------------------------------------------------------------------------ from the code


@dataclass(frozen=True)
class Launched:
    kernel: str
    arguments: dict[str, Any]
    code: Code


def launches(shape: str, op: str) -> Iterator[Launched]:
    """Of `op` with the large tile and a kept bias, compiled."""
    os.environ.pop("TRITON_INTERPRET", None)
    from sparsefeat_kernels.encode.gpu import threshold, tiles, topk

    from tests.kernels import ahead_of_time as ahead

    tiles.has_copy_engine = lambda: True
    tiles.multiprocessors = lambda device: MULTIPROCESSORS
    d, n_latents, k = sizes(shape)
    with torch.device("meta"), ahead.recorded() as calls:
        sizes_of = (ROWS, d), (n_latents, d), (n_latents,), (d,)
        x, W, b_enc, b_pre = (torch.empty(size, dtype=torch.bfloat16) for size in sizes_of)
        bias = torch.empty(n_latents)
        if op == "topk_encode":
            # No ReLU: it is a branch, which a row whose k largest are positive does not take.
            topk.topk_encode_triton(x, W, b_enc, b_pre, k, "raw", bias, tiles.LARGE_TILE)
        else:
            threshold.threshold_encode_triton(x, W, b_enc, b_pre, b_enc, 4 * k, bias, tiles.LARGE_TILE)
    yield from compiled_for_sm_90(calls)


def compiled_for_sm_90(calls: list[tuple[Any, dict[str, Any]]]) -> Iterator[Launched]:
    os.environ.setdefault("TRITON_CACHE_DIR", str(COMPILED))
    import triton

    from tests.kernels import ahead_of_time as ahead

    compiled: dict[str, Code] = {}
    for kernel, arguments in calls:
        source, options = ahead.specialised(kernel, arguments)
        if (key := ahead.key_of(kernel, source, options)) not in compiled:
            made = triton.compile(source, target=ahead.TARGETS["sm_90"], options=options)
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(made.asm["cubin"])
                cubin.flush()
                compiled[key] = Code(Path(cubin.name), ahead.TOOLS / "cuobjdump")
        yield Launched(kernel.fn.__name__, arguments, compiled[key])


def product(one: Launched, shape: str) -> float:
    """cuBLAS's own time, by its tile of the same size, and the epilogue, which nothing overlaps: one program is all that a
    multiprocessor has room for."""
    (d, of_all, k), a = sizes(shape), one.arguments
    rows, n_latents = a["rows"], a["n_latents"]
    tiles = tiles_of(rows, n_latents, a["BLOCK_ROWS"], a["BLOCK_LATENTS"])
    whole = tiles_of(ROWS, of_all, 128, 256)
    work = tiles * 2 * a["BLOCK_ROWS"] * a["BLOCK_LATENTS"] * d / CUBLAS
    work *= waves(tiles, MULTIPROCESSORS) / waves(whole, MULTIPROCESSORS)
    epilogue = math.ceil(tiles / MULTIPROCESSORS) * a["num_warps"] * clocks(one.code.after_product()) / CLOCK
    moved = 2 * (n_latents + rows) * d
    if "kept_ptr" in a:
        moved += 4 * a["kept_ptr"].shape[1] * rows * a["n_groups"]
    else:  # words, and the 32 pre-activations of those that are not 0
        moved += 4 * rows * a["n_words"] * (1 + 32 * min(1, 32 * k / of_all))
    return max(work + epilogue, moved / MEMORY)


def compaction(one: Launched, shape: str, rows: int) -> float:
    """Its inner loop has a trip for each active latent of the word with the most, of latents spread by chance; behind the
    last chunk zeros fill the row. It fetches words and pre-activations, one after the other."""
    (_, n_latents, k), a = sizes(shape), one.arguments
    per_word, blocks = 32 * k / n_latents, math.ceil(a["n_words"] / a["BLOCK_WORDS"])
    at_most, most = math.exp(-per_word), 0.0  # P(a word has so many), the mean of the most that one of a block has
    for trip in range(1, 32):
        most += 1 - at_most ** min(a["n_words"], a["BLOCK_WORDS"])
        at_most += math.exp(-per_word) * per_word**trip / math.factorial(trip)
    outer, inner = one.code.outer_and_inner()
    code = ((one.code.ops, 1), (outer, blocks - 1), (inner, blocks * (most - 1)))
    work = sum(clocks(ops) * times for ops, times in code)
    instructions = sum(len(ops) * times for ops, times in code) + (1 + blocks) * FETCH / LATENCY
    moved = 4 * rows * (a["n_words"] + 24 * per_word * a["n_words"])  # an entry is read from one sector, written to two
    return max(by_rows(rows, 1, work, instructions), moved / MEMORY)


def selection(one: Launched, rows: int) -> float:
    """Of rows that are proved: the others count up an atomic counter, in a branch of their own."""
    ops = one.code.without("ATOMG") + (TRIPS - 1) * one.code.bisection()
    seconds = by_rows(rows, one.arguments["num_warps"], clocks(ops), len(ops))
    return max(seconds, 4 * rows * one.arguments["n_groups"] / MEMORY)


def repair(one: Launched, shape: str, rows: int) -> float:
    """Of as many rows as have three of their k largest in one group, of latents spread by chance: one suspect each. In a
    later chunk of latents fewer are among the k largest so far."""
    (d, _, k), a = sizes(shape), one.arguments
    here = k * a["n_latents"] / (a["first_latent"] + a["n_latents"])
    unproved = here * max(here - 1, 0) * max(here - 2, 0) / 6 / (a["n_latents"] / 16) ** 2 * rows
    fetches = 4 + math.ceil(d / a["BLOCK_D"])
    one_row = (len(one.code.ops) * LATENCY + fetches * FETCH) / CLOCK
    return min(unproved, math.ceil(unproved / (2 * MULTIPROCESSORS))) * one_row


def predicted(shape: str, op: str = "topk_encode") -> dict[str, float]:
    """Seconds by part, and `ratio` to the bare product."""
    parts = dict.fromkeys(("product", "selection", "repair", "compaction", "launches"), 0.0)
    rows = 0
    for one in launches(shape, op):
        part = one.kernel.removesuffix("_kernel").rpartition("_")[2]
        if part == "product":
            rows = one.arguments["rows"]
            parts["product"] += product(one, shape)
        elif part == "select":
            parts["selection"] += selection(one, rows)
        elif part == "repair":
            parts["repair"] += repair(one, shape, ROWS)
        else:
            parts["compaction"] += compaction(one, shape, rows)
        parts["launches"] += LAUNCH
    return {name: seconds for name, seconds in parts.items() if seconds} | {"ratio": sum(parts.values()) / bare(shape)}


def maps(batch: int, heads: int, n: int, d: int, t: int) -> dict[str, float]:
    """Seconds of attention_with_map_ of all keys: `memory` what it reads and writes once, `program` the waits of one program,
    head after head, `work` the instructions of the busiest multiprocessor; `total` with its launches."""
    os.environ.pop("TRITON_INTERPRET", None)
    from sparsefeat_kernels.attention import map as op

    from tests.kernels import ahead_of_time as ahead

    op.backend = lambda: "cuda"
    with torch.device("meta"), ahead.recorded() as calls:
        query = torch.empty(batch, n, heads, d, dtype=torch.bfloat16).transpose(1, 2)
        key, value = (torch.empty(batch, t, heads, d, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
        group, out = torch.empty(batch, dtype=torch.int32), torch.empty_like(query)
        op._attention_triton(torch.empty(batch, n, t), query, key, value, d**-0.5, None, None, group, None, out)
    (one,) = compiled_for_sm_90(calls)
    a, loop = one.arguments, one.code.innermost("HMMA", "HGMMA")
    parts = math.ceil(heads / a["heads_each"])
    programs = math.ceil(n / a["BLOCK_ROWS"]) * batch * parts
    a_program = a["heads_each"] * (len(loop) * LATENCY + FETCH) / CLOCK
    work = math.ceil(programs / MULTIPROCESSORS) * a["num_warps"] * clocks(loop) * a["heads_each"] / CLOCK
    waves_of = math.ceil(programs / (MULTIPROCESSORS * max(1, REGISTERS // (one.code.registers * 32 * a["num_warps"]))))
    copies = 4 * batch * n * t * (3 * parts if parts > 1 else 0)  # zeros, what is added to them, their sum
    moved = (4 * batch * heads * (n + t) * d + 8 * batch * n * t + copies) / MEMORY
    found = {"memory": moved, "program": waves_of * a_program, "work": work}
    return found | {"total": max(found.values()) + LAUNCH * (1 if parts == 1 else 4), "programs": programs}


def said(parts: dict[str, float]) -> str:
    return ", ".join(f"{name} {seconds * 1e6:.1f} us" for name, seconds in parts.items())


def main() -> None:
    for size in MAPS:
        found = maps(*size)
        programs = found.pop("programs")
        print(f"attention_with_map_ {'/'.join(map(str, size))}: {programs:.0f} programs, {said(found)}", flush=True)
    for op in OPS:
        for shape, most in SHAPES.items():
            found = predicted(shape, op)
            parts = ", ".join(f"{name} {seconds * 1e6:.0f} us" for name, seconds in found.items() if name != "ratio")
            wanted = f"at most {most}; before {design_a(shape):.1f}" if op == "topk_encode" else f"at most {THRESHOLD}"
            print(
                f"{op} {shape}: {found['ratio']:.3f} x the bare product ({wanted}); "
                f"the product alone {bare(shape) * 1e6:.0f} us, {parts}",
                flush=True,
            )


if __name__ == "__main__":
    main()
