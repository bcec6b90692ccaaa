"""Work in processes of its own, each step of it watched.

After an illegal access a process cannot use its GPU any more, and a kernel that never ends cannot be stopped from
inside: so an op has a process, which says on a pipe which step it begins and what came of it. A step that takes too long
ends its process (`faulthandler`, with the stack on the log), and the parent kills what does not even do that. The steps
after the one that ended a process are begun in another one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import dispatch

from bench.interpreted import hasten

ROOT = Path(__file__).resolve().parents[2]
GRACE_S = 10.0  # after the limit of a step, until the parent kills its process
STARTING_S = 60.0  # until a process has imported torch and its steps: they all start at once, from a cold disk
NOT_REACHED = "not reached"  # begins the fault of a step of which nothing is known
LIVES = 4  # processes that one job may end
STACK_CHARACTERS, LOGGED_CHARACTERS = 1500, 50_000  # of a process's last words, in the result and in the log


@dataclass(frozen=True)
class Step:
    """A name, and what is run: it returns what is said of it, of which `fault` ("": none) says whether it is right. Where
    that has `spoilt`, nothing more is run in its process."""

    name: str
    run: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True)
class Job:
    """The steps of one op, made in the child by `table` (module:function) called with `name` and `arguments`."""

    name: str
    table: str
    steps: tuple[str, ...]
    limit: float  # seconds, of one step
    arguments: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    log: str = ""  # where what its processes print is kept


def environment(**variables: str) -> dict[str, str]:
    """Of a child: the checkout's packages before installed ones, and kernels that are interpreted only when that is asked."""
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", **variables}


def command(arguments: list[str], limit: float, **variables: str) -> tuple[int | None, str]:
    """Exit code (None: stopped at its limit) and output. What the program started ends with it: a sanitizer's or a
    compiler's child would keep the GPU, or the cores, that the next stage is timed on."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(**variables), text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit, 1.0))
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]


# ---------------------------------------------------------------------------------------------------------- the parent


class Child:
    """One process, from its start on; it waits with everything imported until `run` lets it go."""

    def __init__(self, job: Job, steps: Sequence[str]):
        self.job = job
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.read, write = os.pipe()
        asked = {
            "table": job.table, "name": job.name, "arguments": dict(job.arguments), "steps": list(steps),
            "limit": job.limit, "pipe": write,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.children", json.dumps(asked)], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=self.said, stderr=subprocess.STDOUT, env=environment(**job.environment), pass_fds=(write,),
            start_new_session=True,
        )  # fmt: skip
        os.close(write)
        self.buffer = b""

    def lines(self, until: Callable[[], float]) -> Iterator[dict[str, Any] | None]:
        """What the child says, line by line; None once at the end, or when `until()` (a time) has passed."""
        while True:
            while b"\n" in self.buffer:
                line, _, self.buffer = self.buffer.partition(b"\n")
                yield json.loads(line)
            wait = until() - time.monotonic()
            ready = wait > 0 and select.select([self.read], [], [], wait)[0]
            more = os.read(self.read, 1 << 16) if ready else b""
            if not more:
                yield None
                return
            self.buffer += more

    def run(self, deadline: float, told: Callable[[str, dict[str, Any]], None]) -> tuple[str | None, str]:
        """Let it go and hand every step's result to `told`. Returns the step in hand when it ended before its time (None:
        none was), and how it ended ("": well)."""
        in_hand: str | None = None
        self.limit = time.monotonic() + STARTING_S
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        for line in self.lines(lambda: min(self.limit, deadline)):
            if line is None:
                break
            self.limit = time.monotonic() + self.job.limit + GRACE_S
            if "begun" in line:
                in_hand = line["begun"]
            else:
                told(line.pop("step"), line)
                in_hand = None
        return in_hand, self.end(time.monotonic() >= deadline)

    def end(self, out_of_time: bool = False) -> str:
        """How it ended, after killing it if it has not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.0 if out_of_time else 5.0)
        code = self.process.poll()
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it may hang in the driver: it is left behind then
                self.process.wait(5.0)
        os.close(self.read)
        with contextlib.suppress(BrokenPipeError):  # it may have ended before it was let go
            self.process.stdin.close()  # type: ignore[union-attr]
        if self.job.log and (words := self.last_words(LOGGED_CHARACTERS)):
            with open(self.job.log, "a") as log:
                log.write(f"######## {self.job.name}: {'killed' if code is None else f'exit code {code}'}\n{words}\n")
        if code == 0:
            return ""
        if code is None:
            return f"{NOT_REACHED}: it was stopped when the time was over" if out_of_time else "hung, and was killed"
        words = self.last_words()
        if "Timeout (" in words:
            return f"hung: nothing after {self.job.limit:.0f} s; {words}"
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; {words}" if words else how

    def last_words(self, characters: int = STACK_CHARACTERS) -> str:
        self.said.seek(0)
        return self.said.read().strip()[-characters:]


Told = Callable[[str, str, dict[str, Any]], None]


def run_job(job: Job, deadline: float, told: Told, child: Child | None = None) -> None:
    """All steps of a job, `told(job, step, result)` after each; those that were not reached are told too."""
    left = list(job.steps)

    def one(step: str, result: dict[str, Any]) -> None:
        left.remove(step)
        told(job.name, step, result)

    ended, lives = "", LIVES
    while left and lives and time.monotonic() < deadline:
        child, before = child or Child(job, left), len(left)
        in_hand, ended = child.run(deadline, one)
        child = None
        lives -= bool(ended) or len(left) == before
        if in_hand is not None:
            one(in_hand, {"fault": ended or "ended without an answer"})
        elif ended and len(left) == before:  # before its first step; between two, the one before said what was wrong
            one(left[0], {"fault": ended})
    if child is not None:
        child.end(out_of_time=True)
    for step in tuple(left):
        why = ended.splitlines()[0].removeprefix(f"{NOT_REACHED}: ") if ended else "no time was left"
        one(step, {"fault": f"{NOT_REACHED}: {why}"})


def in_turn(jobs: Sequence[Job], deadline: float, told: Told, ahead: int) -> None:
    """One job after the other, alone on the GPU; the next `ahead` ones import while they wait."""
    waiting: list[Child] = []
    for place, job in enumerate(jobs):
        for later in jobs[place + len(waiting) : place + 1 + ahead]:
            if time.monotonic() < deadline:
                waiting.append(Child(later, later.steps))
        run_job(job, deadline, told, waiting.pop(0) if waiting else None)
    for child in waiting:
        child.end(out_of_time=True)


# ----------------------------------------------------------------------------------------------------------- the child


def synchronised() -> None:
    """Raises what a kernel left behind: nothing after it could be believed."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def answer(step: Step) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        found = dict(step.run())
        synchronised()
    except Exception as error:  # a result like any other
        traceback.print_exc()
        text = str(error).strip().splitlines()
        found = {"fault": f"raised {type(error).__name__}: {text[0] if text else ''}"[:400]}
    return {"step": step.name, **found, "seconds": round(time.perf_counter() - began, 2)}


def child(asked: Mapping[str, Any]) -> None:
    def say(**what: Any) -> None:
        os.write(asked["pipe"], json.dumps(what).encode() + b"\n")

    module, function = asked["table"].split(":")
    steps: Sequence[Step] = getattr(importlib.import_module(module), function)(asked["name"], **asked["arguments"])
    if torch.cuda.is_available():
        torch.cuda.init()
    sys.stdin.readline()
    for step in steps:
        if step.name not in asked["steps"]:
            continue
        say(begun=step.name)
        faulthandler.dump_traceback_later(asked["limit"], exit=True)
        said = answer(step)
        faulthandler.cancel_dump_traceback_later()
        say(**said)
        if said.get("spoilt"):
            return
        synchronised()  # ends this process if the GPU is lost to it: the others steps get a new one
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    if dispatch.INTERPRETED:
        hasten()
    child(json.loads(sys.argv[1]))
