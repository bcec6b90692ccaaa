"""Work of one thread, done by as many processes at once as torch has threads."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Callable, Sequence

import torch


def at_once(parts: Sequence[Callable[[], object]]) -> None:
    """Call them in processes forked from this one, which keep on disk what they make. What a part raises is told, and left to who
    then misses what it was to make; with one thread nothing is called.

    Steps of one picture gain nothing from a second thread (55 ms with one as with two), and half again from a second process.
    """
    n = min(torch.get_num_threads(), len(parts))
    if n < 2:
        return
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_each, args=(parts[i::n],), daemon=True) for i in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads; a child uses none of them
        for worker in workers:
            worker.start()
    for worker in workers:
        worker.join()


def _each(parts: Sequence[Callable[[], object]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to hear; it ends its daemons
    torch.set_num_threads(1)
    for part in parts:
        part()
