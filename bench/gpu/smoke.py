"""The first minutes on a GPU, complete in themselves: is every op right, and what do the most wanted ones take.

smoke.json has, after every step, the machine, `checks` (op, step: the fault, "" for none), `times` (op, shape: records)
and `summary` (op: "passed", or what did not).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels.dispatch import backend

from bench.gpu import checks, times
from bench.gpu.children import NOT_REACHED, Job, Told, in_turn, run_job
from bench.gpu.record import Record
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import versions

BUDGET_S = 150.0
REHEARSAL_S = 1200.0
CHECKS_S = 95.0  # of the budget, at most; the times have the rest, and what they leave the checks that were not reached
CHECK_S, TIME_S = 45.0, 30.0  # that one step may take: compiling all its kernels is in it
WORKERS = 12  # checks at once: beyond, their inputs do not fit 80 GB
AHEAD = 2  # processes that import while another one is timed


@dataclass(frozen=True)
class Tables:
    """The modules whose `checks` and `times` are run; another one's in the tests of this file."""

    checks: str = "bench.gpu.checks:checks"
    times: str = "bench.gpu.times:times"


def jobs(out: Path, only: Sequence[str], rehearse: bool, tables: Tables) -> tuple[list[Job], list[Job]]:
    """The checks, each op in a process with launches that block, so that an error names the op that made it; the times."""
    variables: dict[str, str] = (
        {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if rehearse else {}
    )
    variables["SPARSEFEAT_TUNING"] = ""  # what is checked and timed is what a user without a table has
    arguments, log = {"rehearse": rehearse}, str(out / "smoke.log")

    def wanted(op: str) -> bool:
        return not only or any(op.startswith(name) for name in only)

    def job(op: str, table: str, steps: list[Any], limit: float, **more: str) -> Job:
        names = tuple(step.name for step in steps)
        return Job(op, table, names, limit, arguments, variables | more, log)

    checked = [
        job(op, tables.checks, checks.checks(op, rehearse), CHECK_S, CUDA_LAUNCH_BLOCKING="1")
        for op in checks.CHECKS
        if wanted(op)
    ]
    timed = [job(op, tables.times, times.times(op, rehearse), TIME_S) for op in times.OPS if wanted(op)]
    return [one for one in checked if one.steps], timed


def machine(rehearse: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device_name(), "date": date.today().isoformat(), "versions": versions()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["backend"] = backend()
        found["capability"] = list(torch.cuda.get_device_capability(0))
        found["multiprocessors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
    return found | {"rehearsal": rehearse, "command": "python -m bench.gpu smoke"}


def verdict(steps: Mapping[str, Mapping[str, Any]]) -> str:
    """Of one op. What was not reached is no pass."""
    faults = {name: step["fault"] for name, step in steps.items() if step["fault"]}
    wrong = {name: fault for name, fault in faults.items() if not fault.startswith(NOT_REACHED)}
    if wrong:
        name, fault = next(iter(wrong.items()))
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        return f"failed at {name}: {fault}{more}"
    return f"{len(faults)} of {len(steps)} steps not reached" if faults else "passed"


class Kept:
    """What is told, in the record and on the screen."""

    def __init__(self, record: Record, checked: Sequence[Job]):
        self.record, self.lock = record, threading.Lock()
        self.expected = {job.name: job.steps for job in checked}

    def told(self, kind: str) -> Told:
        def one(op: str, step: str, result: dict[str, Any]) -> None:
            with self.lock:
                of = self.record.done.setdefault(kind, {})
                of.setdefault(op, {})[step] = result
                self.record.done["summary"] = self.summary()
                self.record.keep(kind, of)
                took = f"{result['seconds']:6.1f} s  " if "seconds" in result else " " * 10
                print(
                    f"{took}{op}, {step}: {result['fault'].splitlines()[0] if result['fault'] else 'right'}", flush=True
                )

        return one

    def unreached(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with the steps of which nothing is known yet."""

        def steps(job: Job) -> tuple[str, ...]:
            done = self.record.done["checks"][job.name]
            return tuple(name for name in job.steps if done[name]["fault"].startswith(NOT_REACHED))

        return [replace(job, steps=left) for job in jobs if (left := steps(job))]

    def summary(self) -> dict[str, str]:
        found = {}
        for kind, steps_of in (("checks", self.expected), ("times", self.record.done.get("times", {}))):
            for op, names in steps_of.items():
                done = self.record.done.get(kind, {}).get(op, {})
                steps = {name: done.get(name, {"fault": NOT_REACHED}) for name in names}
                found[op if kind == "checks" else f"times of {op}"] = verdict(steps)
        return found


def smoke(
    out: Path, budget: float | None = None, only: Sequence[str] = (), rehearse: bool = False, tables: Tables = Tables()
) -> bool:
    """Run it all; whether every op passed."""
    budget = budget or (REHEARSAL_S if rehearse else BUDGET_S)
    record = Record(out, "smoke.json", budget)
    record.done = {}
    record.keep("machine", machine(rehearse))
    checked, timed = jobs(out, only, rehearse, tables)
    kept = Kept(record, checked)
    end = time.monotonic() + record.left
    deadline = min(end, time.monotonic() + CHECKS_S / BUDGET_S * budget) if timed else end
    workers = max(2, min(WORKERS, (os.cpu_count() or 2) - 2))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda job: run_job(job, deadline, kept.told("checks")), checked))
        record.keep("checks took", round(budget - record.left, 1))
        in_turn(timed, end, kept.told("times"), AHEAD)
        list(pool.map(lambda job: run_job(job, end, kept.told("checks")), kept.unreached(checked)))
    record.keep("took", round(budget - record.left, 1))
    print("\n".join(report(record.done)), flush=True)
    return all(what == "passed" for what in kept.summary().values())


def report(done: Mapping[str, Any]) -> list[str]:
    """The result in words: what passed, by op, and the times."""
    about = done["machine"]
    rehearsed = " A rehearsal: interpreted on a CPU, its times say nothing." if about["rehearsal"] else ""
    lines = ["", f"{about['device']}, {about['date']}, {done.get('took', 0):.0f} s.{rehearsed}", ""]
    lines += [f"{op:36s}{what.splitlines()[0]}" for op, what in done.get("summary", {}).items()]
    for op, shapes in done.get("times", {}).items():
        for shape, found in shapes.items():
            lines += ["", f"{op}, {shape}"]
            for record in found.get("records", ()):
                lines.append(time_line(record))
    return lines


def time_line(record: Mapping[str, Any]) -> str:
    if not record["checked"]:
        return f"  {record['provider']:42s}no time: {record['fault']}"
    graph = record.get("graph_ms", "")
    graph = f", {graph:.3f} as a graph" if isinstance(graph, float) else f" ({graph})" if graph else ""
    bounds = [f"{1 / ratio:.2f} x {name}" for name, ratio in record["ratio"].items() if name == "the product alone"]
    return f"  {record['provider']:42s}{record['median_ms']:9.3f} ms{graph}{''.join(', ' + b for b in bounds)}"
