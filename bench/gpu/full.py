"""Everything else worth doing on one GPU, in seven minutes: `python -m bench.gpu full --out FOLDER`, after smoke.

    bench      bench.shapes.gpu_figures by the Triton kernels, the most wanted first
    tests      every file of tests/kernels on the GPU, several at a time, each with a time limit; with diffusers also
               tests/pipeline/test_gpu.py
    repeats    every op twenty times on the same inputs: the same bits
    tuning     `python -m sparsefeat_kernels.tuning`: tuning.json
    tuned      the figures of ops that have such a table again, by it
    sanitizer  every op once on small inputs under compute-sanitizer, where that is installed
    scaling    cost against rows, n_latents, k, d_model

in this order, each within its share of the time and in a process of its own: after an illegal access a process cannot use
its GPU any more, and a stage that dies must not take the others with it. A figure or a test that hangs ends its process
by itself. Whatever is finished is in FOLDER at any moment, and the same command with `--resume FOLDER` goes on from there.
Tables and plots are drawn from it where there is time: `python -m bench.gpu draw --out FOLDER`.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import tuning_table
from sparsefeat_kernels.tuning import measure as tuning_of

from bench import peers, scaling
from bench.gpu.children import ROOT, command, environment, synchronised
from bench.gpu.record import Record
from bench.gpu.repeats import repeats
from bench.measure import Results, measure_ceilings
from bench.run import file_name, run, write_plot, write_table
from bench.shapes import Wanted, gpu_figures
from sparsefeat.measure.machine import device_name
from sparsefeat.whole import write_json

BUDGET_S = 420.0
TUNING_SHAPE_S = 15.0
TEST_FILE_S = 110.0
FIGURE_S = 60.0  # after which a figure hangs: torch.compile is in it
SHARES = {
    "bench": 0.42,
    "tests": 0.27,
    "repeats": 0.06,
    "tuning": 0.12,
    "tuned": 0.06,
    "sanitizer": 0.1,
    "scaling": 1.0,
}
# The ops that most depends on, those first that take long to compile; the others follow by name.
TESTS_FIRST = (
    "test_topk_kernels.py",
    "test_topk.py",
    "test_map.py",
    "test_threshold.py",
    "test_registration.py",
    "test_pursuit.py",
    "test_rows.py",
    "test_tuning.py",
    "test_sparse_decode.py",
)
TEST_THREADS = 2  # of torch on the CPU, a test process: the fp64 references are small
# A figure that ended its process is not begun again, and so many times the rest is.
BENCH_LIVES = 4
STARTING_S = 20.0  # until a process has imported torch and begins
SKIPPED = "test_ahead_of_time"  # they compile for other GPUs and need none
# Offloading and half precision of whole pipelines, where diffusers is installed.
ATTACH = ROOT / "tests" / "pipeline" / "test_gpu.py"
KERNELS = {"SPARSEFEAT_FORCE_TRITON": "1"}  # what is measured and watched here, whatever the default on this device


def share(record: Record, stage: str) -> float:
    """Seconds a stage may take now."""
    return max(0.0, min(record.left, SHARES[stage] * record.budget))


def last_line(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1].strip("= ") if lines else ""


def files_to_test() -> list[Path]:
    """What is run, in the order in which it is begun."""
    files = [
        path for path in sorted((ROOT / "tests" / "kernels").rglob("test_*.py")) if not path.name.startswith(SKIPPED)
    ]
    files.sort(key=lambda path: TESTS_FIRST.index(path.name) if path.name in TESTS_FIRST else len(TESTS_FIRST))
    return [*files, ATTACH] if importlib.util.find_spec("diffusers") is not None else files


def within_tests(path: Path) -> str:
    return path.relative_to(ROOT / "tests").as_posix()


def tests(record: Record) -> None:
    """Each file's exit code and closing line in gpu.json, their outputs in tests.log."""
    results: dict[str, Any] = record.done.get("tests", {})
    files = [path for path in files_to_test() if results.get(within_tests(path), {}).get("code") != 0]
    deadline = time.monotonic() + share(record, "tests")

    def one(path: Path) -> tuple[str, int | None, str]:
        limit = min(TEST_FILE_S, deadline - time.monotonic())
        if limit < 5:
            return within_tests(path), None, "not begun: no time was left"
        arguments = [sys.executable, "-m", "pytest", str(path), "-q", "--maxfail=5", "-p", "no:cacheprovider"]
        arguments += ["-p", "bench.gpu.watchdog"]
        # Launches that block: the test that made an illegal access is the one that fails of it.
        return within_tests(path), *command(
            arguments, limit, OMP_NUM_THREADS=str(TEST_THREADS), CUDA_LAUNCH_BLOCKING="1"
        )

    def ops_once() -> tuple[str, int | None, str]:
        """What the sanitizer will watch is compiled here: under it that takes too long."""
        limit = min(TEST_FILE_S, deadline - time.monotonic())
        return "one of each", *command(one_of_each_command(), limit, **KERNELS)

    with ThreadPoolExecutor(max(1, min(12, (os.cpu_count() or 2) - 2))) as pool:
        begun = [pool.submit(ops_once)] if results.get("one of each", {}).get("code") != 0 else []
        for finished in as_completed([*begun, *(pool.submit(one, path) for path in files)]):
            name, code, output = finished.result()
            results[name] = {"code": code, "said": last_line(output)}
            with (record.out / "tests.log").open("a") as log:
                log.write(f"######## {name}: {'stopped at its limit' if code is None else f'exit code {code}'}\n")
                log.write(output[-200_000:] + "\n")
            record.keep("tests", results)
            print(f"{name}: {results[name]}", flush=True)


def one_of_each_command() -> list[str]:
    return [sys.executable, "-m", "bench.gpu", "once"]


def sanitizer(record: Record) -> None:
    if record.done.get("sanitizer", {}).get("code") == 0:
        return
    tool = shutil.which("compute-sanitizer")
    if tool is None or not torch.cuda.is_available():
        record.keep("sanitizer", {"code": None, "said": "compute-sanitizer is not installed, or there is no GPU"})
        return
    # Without the caching allocator every tensor is an allocation of its own, and one byte past its end is seen.
    arguments = [tool, "--tool", "memcheck", "--error-exitcode", "9", *one_of_each_command()]
    code, output = command(arguments, share(record, "sanitizer"), PYTORCH_NO_CUDA_MEMORY_CACHING="1", **KERNELS)
    record.keep("sanitizer", {"code": code, "said": output[-4000:]})
    print(f"compute-sanitizer: {code}, {last_line(output)}", flush=True)


def tuning(record: Record) -> None:
    if record.done.get("tuning", {}).get("code") == 0:
        return
    table, limit = record.out / "tuning.json", share(record, "tuning")
    arguments = [sys.executable, "-m", "sparsefeat_kernels.tuning", "--out", str(table)]
    # The command ends between two shapes, a shape takes a few seconds: what is measured then is a table.
    code, output = command([*arguments, "--seconds", str(max(1.0, limit - TUNING_SHAPE_S))], limit)
    record.keep("tuning", {"code": code, "said": output[-4000:]})
    print(f"tuning: {code}, {last_line(output)}", flush=True)


def results_of(record: Record, name: str = "") -> Results:
    return Results(record.out / f"{file_name(device_name())}{name}.json", command="python -m bench.gpu full")


def measured(record: Record, stage: str, figures: Iterator[Wanted], results: Results) -> None:
    """Figure by figure; `died` names those that ended the process of an earlier run of this stage."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results.not_installed = peers.load()[1]
    before = record.done.get(stage, {})
    died = [*before.get("died", []), *([before["begun"]] if "begun" in before else [])]
    failed: dict[str, str] = dict(before.get("failed", {}))
    ceilings, left = measure_ceilings(device), 0
    deadline = time.monotonic() + share(record, stage) - before.get("seconds", 0.0)
    began = time.monotonic() - before.get("seconds", 0.0)
    for wanted in figures:
        name = f"{wanted.op} {' '.join(map(str, wanted.shape.values()))} {wanted.dtype}"
        if name in died:
            continue
        done = {"died": died, "failed": failed, "seconds": time.monotonic() - began, "begun": name}
        record.keep(stage, done)
        faulthandler.dump_traceback_later(FIGURE_S, exit=True)
        try:
            left += run([wanted], device, results, ceilings, min(record.left, deadline - time.monotonic()))
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:500]
            record.keep(stage, done)
            print(f"{name}: {failed[name]}", flush=True)
        faulthandler.cancel_dump_traceback_later()
        synchronised()  # raises after an illegal access: no figure after this one could be measured
        if device == "cuda":
            torch.cuda.empty_cache()
    results.write()
    record.keep(stage, {"died": died, "failed": failed, "figures left": left})


def bench(record: Record) -> None:
    measured(record, "bench", gpu_figures(), results_of(record))


def tuned(record: Record) -> None:
    """In a file of its own, beside what a user without the table has."""
    table = record.out / "tuning.json"
    if not table.is_file():
        return
    os.environ[tuning_table.VARIABLE] = str(table.resolve())
    # threshold_encode takes the tiles that topk_encode was tuned for.
    by_table = (*tuning_of.OPS, "threshold_encode")
    figures = (wanted for wanted in gpu_figures() if wanted.op in by_table and not wanted.compiled)
    measured(record, "tuned", figures, results_of(record, "-tuned"))


def scale(record: Record) -> None:
    path = record.out / f"scaling-{file_name(device_name())}.json"
    if path.is_file() or record.left < 15:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if points := scaling.sweep(device, "bfloat16", 0.2, record.left - 10.0):
        write_json(path, {"device": device_name(), "points": points})
        record.keep("scaling", {"points": len(points)})


def draw(out: Path) -> None:
    """Tables and plots of what was measured."""
    for path in out.glob("*.json"):
        content = json.loads(path.read_text())
        if "points" in content:
            scaling.draw(content["points"], path.with_suffix(".png"))
        elif content.get("records"):
            write_table(results := Results(path))
            write_plot(results)


STAGES: dict[str, Callable[[Record], None]] = {
    "bench": bench,
    "tests": tests,
    "repeats": lambda record: repeats(record, share(record, "repeats")),
    "tuning": tuning,
    "tuned": tuned,
    "sanitizer": sanitizer,
    "scaling": scale,
}
# These start programs and use no GPU themselves.
PROGRAMS = ("tests", "sanitizer", "tuning")


def in_a_process(name: str, record: Record) -> int | None:
    """Exit code of a stage in a process of its own (None: stopped, at its share's or the budget's end)."""
    spent = record.budget - record.left
    arguments = ["--out", str(record.out), "--budget", str(record.budget), "--spent", str(spent), "--stage", name]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.gpu", "full", *arguments], cwd=ROOT, env=environment(**KERNELS),
        start_new_session=True,
    )  # fmt: skip
    try:
        return process.wait(timeout=max(1.0, min(record.left, SHARES[name] * record.budget + STARTING_S)))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None
    finally:
        record.read()


def take(name: str, record: Record) -> None:
    """One stage, whatever becomes of it."""
    if name in PROGRAMS:
        try:
            STAGES[name](record)
        except Exception as error:  # one stage's failure must not cost the others their time
            record.keep(f"{name} failed", f"{type(error).__name__}: {error}")
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
        return
    for _ in range(BENCH_LIVES if name in ("bench", "tuned") else 1):
        code = in_a_process(name, record)
        if code in (0, None):
            return
        record.keep(f"{name} failed", f"exit code {code}")
        print(f"{name} failed: exit code {code}", flush=True)


def full(
    out: Path,
    budget: float = BUDGET_S,
    spent: float = 0.0,
    only: Sequence[str] = (),
    stage: str | None = None,
    resume: Path | None = None,
) -> None:
    if resume is not None:
        out.mkdir(parents=True, exist_ok=True)
        for path in resume.glob("*"):
            if path.is_file() and not (out / path.name).exists():
                shutil.copy(path, out / path.name)
    record = Record(out, "full.json", budget, spent)
    if stage is not None:
        STAGES[stage](record)
        return
    for name in STAGES:
        if only and name not in only:
            continue
        began = time.monotonic()
        take(name, record)
        print(f"-- {name}: {time.monotonic() - began:.0f} s, {record.left:.0f} s left", flush=True)
