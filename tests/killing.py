"""Work in a process of its own that is killed at random moments, and begun again, until it is let finish.

Moments are in the processor time of the work itself: how busy the machine is does not change what is hit.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Forked from a process that has loaded everything and run nothing: a child is at work at once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["sparsefeat.training.activations.drawing", "sparsefeat.training.run.trainer", "tests.tiny"]
)


def _alone(work: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any] | None = None) -> None:
    torch.set_num_threads(1)
    work(*arguments, **(options or {}))


def _timed(took: Any, work: Callable[..., Any], *arguments: Any) -> None:
    began = time.process_time()
    work(*arguments)
    took.value = time.process_time() - began


def _until(seconds: float, work: Callable[..., Any], *arguments: Any) -> None:
    signal.setitimer(signal.ITIMER_PROF, seconds)  # then the system ends the process outright: nobody handles SIGPROF
    work(*arguments)


def begin(work: Callable[..., Any], *arguments: Any) -> Any:
    """Its process, at work; it ends with this one at the latest."""
    process = _CONTEXT.Process(target=_alone, args=(work, arguments), daemon=True)
    process.start()
    return process


def run(work: Callable[..., Any], *arguments: Any) -> float:
    """Let it finish; returns the seconds of processor time it took."""
    took = _CONTEXT.Value("d")
    run_all([(_timed, (took, work, *arguments), {})])
    return took.value


def run_all(works: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> None:
    """Let several run at once, until all have finished."""
    processes = [_CONTEXT.Process(target=_alone, args=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(works)


def killed(times: int, seconds: float, work: Callable[..., Any], *arguments: Any, seed: int = 0) -> int:
    """Kill as many runs of `work`, each at a random moment of its first `seconds` of processor time, then let one finish; returns
    how many were at work when they were killed."""
    moments, hit = random.Random(seed), 0
    for _ in range(times):
        process = begin(_until, moments.uniform(1e-3, seconds), work, *arguments)
        process.join()
        hit += process.exitcode == -signal.SIGPROF
    run_all([(work, arguments, {})])
    return hit
