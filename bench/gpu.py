"""Everything worth doing on one GPU inside nine minutes: `python -m bench.gpu --out FOLDER`.

    tests      every file of tests/kernels on the GPU, several at a time, each with a time limit; with diffusers also
               tests/pipeline/test_gpu.py
    repeats    every op twenty times on the same inputs: the same bits
    sanitizer  every op once on small inputs under compute-sanitizer, where that is installed
    tuning     `python -m sparsefeat_kernels.tuning`: tuning.json, which the benches after it run by
    bench      bench.shapes.gpu_figures, the most wanted first
    scaling    cost against rows, n_latents, k, d_model

in this order, each within its share of the time and in a process of its own: after an illegal access a process cannot use
its GPU any more, and a stage that dies must not take the others with it. Whatever is finished is in FOLDER at any moment
(eight files at most), and the same command with `--resume FOLDER` goes on from there. Needs torch, triton, pytest, pytest-benchmark, numpy,
safetensors and huggingface_hub; the package need not be installed, and neither does diffusers.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import prepare_encoder, topk_encode
from sparsefeat_kernels.encode.gpu.candidates import default_blocks, topk_candidates_triton
from sparsefeat_kernels.tuning import measure as tuning_of

from bench import peers, scaling
from bench.measure import OURS, Results, available, measure_ceilings
from bench.run import file_name, run, write_plot, write_table
from bench.shapes import Wanted, gpu_figures, sae_shape
from sparsefeat.evaluation import ops_bench
from sparsefeat.evaluation.machine import device_name

ROOT = Path(__file__).resolve().parents[1]
BUDGET_S = 520.0
TUNING_SHAPE_S = 15.0
TEST_FILE_S = 170.0
SHARES = {"tests": 0.36, "repeats": 0.08, "sanitizer": 0.12, "tuning": 0.12, "bench": 1.0, "scaling": 1.0}
# The longest first: what test_candidates.py compiles takes 80 s of one core, more than any other file. Then the ops
# that most depends on; the others follow by name.
TESTS_FIRST = (
    "test_candidates.py",
    "test_map.py",
    "test_topk.py",
    "test_threshold.py",
    "test_registration.py",
    "test_pursuit.py",
    "test_rows.py",
    "test_tuning.py",
    "test_sparse_decode.py",
)
TEST_THREADS = 2  # of torch on the CPU, a test process: the fp64 references are small
ONE_OF_EACH = "--one-of-each"
STAGE = "--stage"
# A figure that ended its process is not begun again, and so many times the rest is.
BENCH_LIVES = 4
SCALING_S = 45.0  # that the bench leaves
STARTING_S = 20.0  # until a process has imported torch and begins
# The ahead-of-time test compiles for other GPUs and needs none.
SKIPPED = ("test_ahead_of_time.py",)
# Offloading and half precision of whole pipelines, where diffusers is installed.
ATTACH = ROOT / "tests" / "pipeline" / "test_gpu.py"
REPEATS = 20
SMALL = {"rows": 33, "d_model": 80, "n_latents": 300, "k": 5}
SMALL_ATTENTION = {"batch": 2, "heads": 3, "n": 70, "t": 19, "d": 40}


@dataclass
class Lease:
    """The folder, the clock, and what is done: `gpu.json`, written after every step."""

    out: Path
    budget: float
    spent: float = 0.0  # of the budget, before this process began

    def __post_init__(self) -> None:
        self.began = time.perf_counter() - self.spent
        self.path = self.out / "gpu.json"
        self.read()

    def read(self) -> None:
        self.done: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @property
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.began)

    def keep(self, stage: str, what: Any) -> None:
        self.done[stage] = what
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.done, indent=1) + "\n")
        temporary.replace(self.path)

    def share(self, stage: str) -> float:
        """Seconds a stage may take now."""
        return max(0.0, min(self.left, SHARES[stage] * self.budget))


def environment() -> dict[str, str]:
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [found.get("PYTHONPATH")])]
    return {**found, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}


def command(arguments: list[str], limit: float, **variables: str) -> tuple[int | None, str]:
    """Exit code (None: stopped at its limit) and output. What the program started ends with it: a sanitizer's or a
    compiler's child would keep the GPU, or the cores, that the next stage is timed on."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env={**environment(), **variables}, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


def files_to_test() -> list[Path]:
    """What is run, in the order in which it is begun."""
    files = [path for path in sorted((ROOT / "tests" / "kernels").rglob("test_*.py")) if path.name not in SKIPPED]
    files.sort(key=lambda path: TESTS_FIRST.index(path.name) if path.name in TESTS_FIRST else len(TESTS_FIRST))
    return [*files, ATTACH] if importlib.util.find_spec("diffusers") is not None else files


def tests(lease: Lease) -> None:
    """Each file's exit code and closing line in gpu.json, their outputs in tests.log."""
    results: dict[str, Any] = lease.done.get("tests", {})
    files = [path for path in files_to_test() if results.get(path.name, {}).get("code") != 0]
    deadline = time.perf_counter() + lease.share("tests")

    def one(path: Path) -> tuple[str, int | None, str]:
        limit = min(TEST_FILE_S, deadline - time.perf_counter())
        if limit < 5:
            return path.name, None, "not begun: no time was left"
        arguments = [sys.executable, "-m", "pytest", str(path), "-q", "--maxfail=5", "-p", "no:cacheprovider"]
        return path.name, *command(arguments, limit, OMP_NUM_THREADS=str(TEST_THREADS))

    def ops_once() -> tuple[str, int | None, str]:
        """What the sanitizer will watch is compiled here: under it that takes too long."""
        return "one of each", *command(one_of_each_command(), min(TEST_FILE_S, deadline - time.perf_counter()))

    with ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 2))) as pool:
        begun = [pool.submit(ops_once)] if results.get("one of each", {}).get("code") != 0 else []
        for finished in as_completed([*begun, *(pool.submit(one, path) for path in files)]):
            name, code, output = finished.result()
            results[name] = {"code": code, "said": last_line(output)}
            with (lease.out / "tests.log").open("a") as log:
                log.write(f"######## {name}: {'stopped at its limit' if code is None else f'exit code {code}'}\n")
                log.write(output[-200_000:] + "\n")
            lease.keep("tests", results)
            print(f"{name}: {results[name]}", flush=True)


def same_bits(op: str, shape: dict[str, int], dtype: str, device: str) -> bool:
    """Whether REPEATS runs of our provider give the same bits."""
    figure = ops_bench.build(op, shape, dtype, device)
    provider = next(p for p in figure.providers if p.name == OURS)
    inputs = figure.inputs(0)

    def answer() -> list[torch.Tensor]:
        state = provider.prepare(inputs)
        found = provider.canonical(state, provider.run(state))
        found = list(found.values()) if isinstance(found, dict) else found
        return [found] if isinstance(found, torch.Tensor) else [t for t in found if isinstance(t, torch.Tensor)]

    with torch.set_grad_enabled(figure.gradients):
        first = answer()
        return all(
            torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)
            for _ in range(REPEATS - 1)
            for a, b in zip(first, answer(), strict=True)
        )


def design_b(sae: dict[str, int], dtype: str, device: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """topk_encode by design B, whatever the tuning table says, with one entry kept a group: a third of the rows at
    SAeUron's shape then have no certificate and are computed again."""
    shape = tuning_of.Shape(sae["rows"], sae["d_model"], sae["n_latents"], sae["k"], dtype)
    inputs = tuning_of.inputs_of(shape, device)
    blocks = default_blocks(shape.n_latents, shape.k, getattr(torch, dtype))
    if blocks is None:
        raise ValueError(f"design B does not run at {shape}; take another shape")
    blocks, weights = replace(blocks, KEPT=1), [inputs[name] for name in ("x", "W", "b_enc", "b_pre")]
    return lambda: topk_candidates_triton(*weights, shape.k, "relu", blocks)


def prefiltered(sae: dict[str, int], dtype: str, device: str) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """topk_encode of float32 through the bf16 product; every third row cannot be proved and is computed plainly."""
    shape = tuning_of.Shape(sae["rows"], sae["d_model"], sae["n_latents"], sae["k"], dtype)
    inputs = tuning_of.inputs_of(shape, device)
    weights = [inputs[name] for name in ("x", "W", "b_enc", "b_pre")]
    weights[0][::3, 0] = torch.inf
    prepared = prepare_encoder(weights[1], weights[2])
    return lambda: topk_encode(*weights, shape.k, prepared=prepared)


# What no figure runs: a function of an SAE's shape, a dtype and a device that makes the call; the dtypes.
OTHER_PATHS = {
    "topk_encode, design B": (design_b, ("bfloat16", "float16", "float32")),
    "topk_encode, prefiltered": (prefiltered, ("float32",)),
}


def path_same_bits(name: str, device: str) -> bool:
    path, dtypes = OTHER_PATHS[name]
    run = path(sae_shape("SAeUron", 1024), dtypes[0], device)
    first = [t.view(torch.int32) for t in run()]  # as bits: NaN is equal to itself
    again = ([t.view(torch.int32) for t in run()] for _ in range(REPEATS - 1))
    return all(torch.equal(a, b) for answer in again for a, b in zip(first, answer, strict=True))


def repeats(lease: Lease) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = lease.done.get("repeats", {})
    deadline = time.perf_counter() + lease.share("repeats")
    for op in available():
        if op in results or time.perf_counter() > deadline:
            continue
        dtype = "float32" if device == "cpu" or op == "matching_pursuit" else "bfloat16"
        shape = shape_of(op, SMALL if device == "cpu" else sae_shape("SAeUron", 1024))
        try:
            results[op] = same_bits(op, shape, dtype, device)
        except Exception as error:
            results[op] = f"{type(error).__name__}: {error}"
        lease.keep("repeats", results)
        print(f"{op}, {REPEATS} times: {results[op]}", flush=True)
    for name in OTHER_PATHS if device == "cuda" else ():
        if name in results:
            continue
        try:
            results[name] = path_same_bits(name, device)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        lease.keep("repeats", results)
        print(f"{name}, {REPEATS} times: {results[name]}", flush=True)


def one_of_each_command() -> list[str]:
    return [sys.executable, "-m", "bench.gpu", ONE_OF_EACH]


def shape_of(op: str, sae: dict[str, int]) -> dict[str, int]:
    if not op.startswith("attention"):
        return dict(sae)
    return {**SMALL_ATTENTION, "selected": 7} if op == "attention_tap" else dict(SMALL_ATTENTION)


def one_of_each(device: str) -> None:
    """Every op once on small inputs of odd sizes: what the sanitizer watches."""
    for op in available():
        figure = ops_bench.build(op, shape_of(op, SMALL), "float32" if op == "matching_pursuit" else "float16", device)
        provider = next(p for p in figure.providers if p.name == OURS)
        with torch.set_grad_enabled(figure.gradients):
            state = provider.prepare(figure.inputs(0))
            provider.run(state)
        if device == "cuda":
            torch.cuda.synchronize()
        print(op, flush=True)
    for name, (path, dtypes) in OTHER_PATHS.items() if device == "cuda" else ():
        for dtype in dtypes:
            path({**SMALL, "rows": 200, "n_latents": 320}, dtype, device)()
        torch.cuda.synchronize()
        print(name, flush=True)


def sanitizer(lease: Lease) -> None:
    if lease.done.get("sanitizer", {}).get("code") == 0:
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        lease.keep("sanitizer", {"code": None, "said": "compute-sanitizer is not installed, or there is no GPU"})
        return
    # Without the caching allocator every tensor is an allocation of its own, and one byte past its end is seen.
    arguments = [tool, "--tool", "memcheck", "--error-exitcode", "9", *one_of_each_command()]
    code, output = command(arguments, lease.share("sanitizer"), PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lease.keep("sanitizer", {"code": code, "said": output[-4000:]})
    print(f"compute-sanitizer: {code}, {last_line(output)}", flush=True)


def tuning(lease: Lease) -> None:
    if lease.done.get("tuning", {}).get("code") == 0:
        return
    table, limit = lease.out / "tuning.json", lease.share("tuning")
    arguments = [sys.executable, "-m", "sparsefeat_kernels.tuning", "--out", str(table)]
    # The command ends between two shapes, a shape takes a few seconds: what is measured then is a table.
    code, output = command([*arguments, "--seconds", str(max(1.0, limit - TUNING_SHAPE_S))], limit)
    lease.keep("tuning", {"code": code, "said": output[-4000:]})
    print(f"tuning: {code}, {last_line(output)}", flush=True)


def results_of(lease: Lease) -> Results:
    return Results(lease.out / f"{file_name(device_name())}.json", command="python -m bench.gpu")


def bench(lease: Lease, figures: Callable[[], Iterator[Wanted]] = gpu_figures) -> None:
    """Figure by figure; `died` names those that ended the process of an earlier run of this stage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = results_of(lease)
    results.not_installed = peers.load()[1]
    before = lease.done.get("bench", {})
    died = [*before.get("died", []), *([before["begun"]] if "begun" in before else [])]
    failed: dict[str, str] = {}
    ceilings, left = measure_ceilings(device), 0
    for wanted in figures():
        name = f"{wanted.op} {' '.join(map(str, wanted.shape.values()))} {wanted.dtype}"
        if name in died:
            continue
        lease.keep("bench", {"died": died, "failed": failed, "begun": name})
        try:
            left += run([wanted], device, results, ceilings, lease.left - SCALING_S)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            print(f"{name}: {failed[name]}", flush=True)
        if device == "cuda":
            torch.cuda.synchronize()  # raises after an illegal access: no figure after this one could be measured
            torch.cuda.empty_cache()
    results.write()
    lease.keep("bench", {"died": died, "failed": failed, "figures left": left})


def tables(lease: Lease) -> None:
    results = results_of(lease)
    if results.records:
        write_table(results)
        write_plot(results)


def scale(lease: Lease) -> None:
    path = lease.out / f"scaling-{file_name(device_name())}.json"
    if path.is_file() or lease.left < 15:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = scaling.sweep(device, "bfloat16", 0.2, lease.left - 10.0)
    if not points:
        return
    path.write_text(json.dumps({"device": device_name(), "points": points}, indent=1) + "\n")
    scaling.draw(points, path.with_suffix(".png"))
    lease.keep("scaling", {"points": len(points)})


STAGES: dict[str, Callable[[Lease], None]] = {
    "tests": tests,
    "repeats": repeats,
    "sanitizer": sanitizer,
    "tuning": tuning,
    "bench": bench,
    "tables": tables,
    "scaling": scale,
}
# These start programs and use no GPU themselves.
PROGRAMS = ("tests", "sanitizer", "tuning")


def in_a_process(name: str, lease: Lease) -> int | None:
    """Exit code of a stage in a process of its own (None: stopped, at its share's or the lease's end)."""
    spent = lease.budget - lease.left
    arguments = ["--out", str(lease.out), "--budget", str(lease.budget), "--spent", str(spent), STAGE, name]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, env=environment(), start_new_session=True
    )
    try:
        return process.wait(timeout=max(1.0, min(lease.left, SHARES.get(name, 1.0) * lease.budget + STARTING_S)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    finally:
        lease.read()


def take(name: str, lease: Lease) -> None:
    """One stage, whatever becomes of it."""
    if name in PROGRAMS:
        try:
            STAGES[name](lease)
        except Exception as error:  # one stage's failure must not cost the others their lease
            lease.keep(f"{name} failed", f"{type(error).__name__}: {error}")
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        return
    for _ in range(BENCH_LIVES if name == "bench" else 1):
        code = in_a_process(name, lease)
        if code in (0, None):
            return
        lease.keep(f"{name} failed", f"exit code {code}")
        print(f"{name} failed: exit code {code}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the results go")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="results of an earlier run to go on from")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--only", choices=STAGES, action="append", help="one stage; may be given more than once")
    parser.add_argument(ONE_OF_EACH, action="store_true", help="run every op once on small inputs, and nothing else")
    parser.add_argument(STAGE, choices=STAGES, help="take one stage in this process, as `--only` does in another")
    parser.add_argument("--spent", type=float, default=0.0, metavar="SECONDS", help="of the budget, before")
    arguments = parser.parse_args()
    if arguments.one_of_each:
        one_of_each("cuda" if torch.cuda.is_available() else "cpu")
        return
    if arguments.out is None:
        parser.error("--out is needed: a folder for the results")
    if not torch.cuda.is_available():
        raise SystemExit("no GPU: python -m bench.run measures a CPU")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.resume is not None:
        for path in arguments.resume.glob("*"):
            if path.is_file() and not (arguments.out / path.name).exists():
                shutil.copy(path, arguments.out / path.name)
    lease = Lease(arguments.out, arguments.budget, arguments.spent)
    if arguments.stage is not None:
        STAGES[arguments.stage](lease)
        return
    for name in STAGES:
        if name in ("bench", "scaling") and (arguments.out / "tuning.json").is_file():
            os.environ["SPARSEFEAT_TUNING"] = str((arguments.out / "tuning.json").resolve())
        if arguments.only and name not in arguments.only:
            continue
        began = time.perf_counter()
        take(name, lease)
        print(f"-- {name}: {time.perf_counter() - began:.0f} s, {lease.left:.0f} s left", flush=True)


if __name__ == "__main__":
    main()
