"""What a call takes the host, Triton's launches with it: `python -m bench.host [OP ...] [--plain]`. No GPU is needed: launches
go to a driver that runs nothing (pretended_driver.py). Half precision; microseconds of processor time, so that other programs
beside it do not count as much. Tensors are a CPU's: what torch computes between the kernels (weight_gradient, feature_stats) is
in the time, so that these have few rows, and the number of its calls counts.
"""

from __future__ import annotations

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import sparsefeat_kernels as kernels
import torch
import triton
from sparsefeat_kernels import dispatch, launch
from sparsefeat_kernels.encode.gpu import tiles

from bench.pretended_driver import pretend
from bench.shapes import CROSS, JOINT, SAES, SELECTED
from sparsefeat.measure.ops.training import as_sae, our_step
from sparsefeat.measure.sae_case import sae_case

CALLS, REPEATS = 50, 15
FEW = 64  # rows, where torch computes between the kernels
MULTIPROCESSORS = 132


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, the least of some repeats."""
    call()
    found = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append(time.thread_time() - begin)
    return min(found) / CALLS * 1e6


def counts(call: Callable[[], object]) -> tuple[int, int]:
    """Launches of Triton's and calls of torch's, in one call."""
    launches = []
    triton.knobs.runtime.launch_enter_hook.add(launches.append)
    try:
        call()
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(launches.append)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    own = [event for event in profile.events() if event.name.startswith("aten::")]
    return len(launches), sum(event.cpu_parent not in own for event in own)


def keep_memory() -> None:
    """Freed memory is used again, as a GPU's allocator does: the system takes microseconds to give and take large pieces."""
    library = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
        library.mallopt(option, value)


def calls() -> Mapping[str, Callable[[], object]]:
    """By name; whatever a launcher allocates once was allocated before."""
    d, n, k = SAES["SAeUron"]
    half = torch.bfloat16
    W, b_enc, b_pre = torch.zeros(n, d, dtype=half), torch.zeros(n, dtype=half), torch.zeros(d, dtype=half)
    kept = kernels.prepare_encoder(W, b_enc, b_pre)
    rows = {number: torch.zeros(number, d, dtype=half) for number in (FEW, 256, 4096)}
    values, indices = torch.ones(4096, k), torch.zeros(4096, k, dtype=torch.int32)
    few_values, few_indices, group = values[:FEW], indices[:FEW], torch.zeros(FEW, dtype=torch.int32)
    threshold = torch.zeros(n)
    latents, rule = torch.arange(8), tuple(torch.zeros(8) for _ in range(5))
    weight = torch.ones(4096)
    tables = torch.zeros(4, n), torch.zeros(4, n, dtype=torch.int32), torch.zeros(4, n)

    found: dict[str, Callable[[], object]] = {
        f"topk_encode, {number} rows{more}": lambda x=x, prepared=prepared: kernels.topk_encode(
            x, W, b_enc, b_pre, k, prepared=prepared
        )
        for number, x in rows.items()
        if number > FEW
        for more, prepared in (("", None), (", bias kept", kept))
    }
    ops = dispatch.ops
    found["threshold_encode, 4096 rows"] = lambda: kernels.threshold_encode(
        rows[4096], W, b_enc, b_pre, threshold, max_active=8 * k
    )
    for name in ("SD 1.5, 64 x 64", "SD 1.5, 16 x 16"):
        found[f"attention_map, {name}"] = _attention(ops.attention_map_, CROSS[name])
    found["attention_map and output, SD 1.5, 64 x 64"] = _attention(ops.attention_with_map_, CROSS["SD 1.5, 64 x 64"])
    found["attention_tap, FLUX"] = _tap(JOINT["FLUX"])
    found["sparse_decode, 4096 rows"] = lambda: kernels.sparse_decode(values, indices, W, b_pre)
    found["sparse_edit, 4096 rows"] = lambda: ops.sparse_edit(
        rows[4096], values, indices, latents, W[:8], *rule, weight
    )
    found[f"feature_stats, {FEW} rows"] = lambda: kernels.feature_stats_(*tables, few_values, few_indices, group)
    found[f"weight_gradient, {FEW} rows"] = lambda: kernels.weight_gradient(
        few_values, few_indices, rows[FEW], b_pre, n
    )
    # Small: what torch computes of it takes a CPU longer than the calls.
    case = sae_case(rows=FEW, d_model=64, n_latents=1024, k=8, dtype="bfloat16", device="cpu", seed=0, dead_norm=0.3)
    step = case, as_sae(case)
    found[f"training step, {FEW} rows, 64 to 1,024"] = lambda: our_step(step)
    return found


def _attention(op: Callable[..., object], shape: Mapping[str, int]) -> Callable[[], object]:
    batch, heads, n, t, d = (shape[name] for name in ("batch", "heads", "n", "t", "d"))
    query = torch.zeros(batch, heads, n, d, dtype=torch.bfloat16)
    key, group = torch.zeros(batch, heads, t, d, dtype=torch.bfloat16), torch.arange(batch)
    value = (key.clone(),) if op is dispatch.ops.attention_with_map_ else ()
    maps = torch.zeros(batch, n, t)
    return lambda: op(maps, query, key, *value, d**-0.5, None, None, group, None)


def _tap(shape: Mapping[str, int]) -> Callable[[], object]:
    batch, heads, n, d = (shape[name] for name in ("batch", "heads", "n", "d"))
    query = torch.zeros(batch, heads, n, d, dtype=torch.bfloat16)
    lse, key = torch.zeros(batch, heads, n), torch.zeros(batch, heads, SELECTED, d, dtype=torch.bfloat16)
    maps, group = torch.zeros(batch, n, SELECTED), torch.arange(batch)
    return lambda: dispatch.ops.attention_tap_(maps, query, key, lse, d**-0.5, None, None, group)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("ops", nargs="*", help="those whose names begin so; default: all")
    parser.add_argument("--plain", action="store_true", help="launch by Triton's own way alone")
    options = parser.parse_args()
    ops = tuple(options.ops) or ("",)
    launch.KNOWN = () if options.plain else launch.KNOWN
    dispatch.INTERPRETED = True  # a CPU's tensors take the launchers too
    keep_memory()
    tiles.multiprocessors = lambda _: MULTIPROCESSORS
    with tempfile.TemporaryDirectory() as folder, kernels.force_triton():
        if not pretend(Path(folder)):
            raise SystemExit("a compiler of C is needed: install gcc")
        print(f"Triton {triton.__version__}: microseconds of a call, launches, calls of torch")
        for name, call in calls().items():
            if name.startswith(ops):
                print(f"{name}: {microseconds(call):.0f}, {', '.join(map(str, counts(call)))}", flush=True)


if __name__ == "__main__":
    main()
