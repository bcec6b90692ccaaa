"""Work in a process of its own that is killed at random moments, and begun again, until it is let finish."""

from __future__ import annotations

import multiprocessing
import random
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


def run(work: Callable[..., Any], *arguments: Any) -> float:
    """Let it finish; returns the seconds it took."""
    seconds = 0.0
    for target in ((time.time, ()), (work, arguments)):  # the first waits until everything is loaded
        began = time.monotonic()
        process = _CONTEXT.Process(target=_alone, args=target)
        process.start()
        process.join()
        assert process.exitcode == 0
        seconds = time.monotonic() - began
    return seconds


def run_all(works: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]) -> None:
    """Let several run at once, until all have finished."""
    processes = [_CONTEXT.Process(target=_alone, args=work) for work in works]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(works)


def killed(times: int, seconds: float, work: Callable[..., Any], *arguments: Any, seed: int = 0) -> int:
    """Kill (SIGKILL) as many runs of `work`, each at a random moment of its first `seconds`, then let one finish; returns how many
    were at work when they were killed."""
    moments, hit = random.Random(seed), 0
    for _ in range(times):
        process = _CONTEXT.Process(target=_alone, args=(work, arguments))
        process.start()
        process.join(moments.random() * seconds)
        process.kill()
        process.join()
        hit += process.exitcode == -9
    run(work, *arguments)
    return hit
