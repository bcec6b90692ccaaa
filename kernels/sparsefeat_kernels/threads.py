"""A few large pieces of work for a CPU's threads, instead of a parallel region in every op.

Torch splits every op over its threads and waits for the last of them. Beside other programs one of the threads is often put
aside by the system, for milliseconds, and a call of hundreds of small ops waits hundreds of times. Here a whole call is
`conducted` by one thread, whose ops run on it alone, and which hands out large pieces of work `together`: what is waited
for is the end of a handful of phases.

Torch's own threads do it where they can be asked (GNU's OpenMP, torch's on Linux): after an op they look for the next one for
milliseconds without a pause, and any other thread has to share a core with them. Else, and for a while after they were twice
put aside (a region ends when its last thread has come), threads of Python's do.

The number of threads that torch's ops take is kept by each thread. `torch.set_num_threads` sets it for the thread that
calls and for those that have not asked for it yet. So each of these threads is told once that it has but its share, and the
caller's number is put back for whoever begins next.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

__all__ = ["PIECES_A_THREAD", "Task", "conducted", "each", "pieces", "shares", "threads", "together"]

Task = Callable[[], None]
Item = TypeVar("Item")
P = ParamSpec("P")
R = TypeVar("R")

MOST_THREADS = 8  # more of them share Python's lock badly: beyond, each has several of torch's threads
PIECES_A_THREAD = 4  # whoever is put aside by the system leaves the others its pieces

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()
_conducting = threading.local()  # pool: of the call that this thread conducts
_forked = False


def _forget() -> None:
    """After a fork there are no threads, and another thread may have held the lock."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


SOON_S = 1.0  # who conducts begins long before, or never will
LATE_S = 1e-3  # for which a region waits for its threads; twice in a row only where a machine has others to serve
LATER_S = 0.5  # until they are asked again
late = 0  # regions in a row
asked_again = 0.0  # time.monotonic
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def openmp() -> ctypes.CDLL | None:
    """GNU's OpenMP, if it is what torch brings along and uses."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    if len(found) != 1 or not torch.backends.openmp.is_available():
        return None
    try:
        library = ctypes.CDLL(str(found[0]))
        library.GOMP_parallel.argtypes = _REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        library.GOMP_parallel.restype = library.omp_set_num_threads.restype = None
    except (OSError, AttributeError):
        return None
    return library


class Team(Executor):
    """The threads of one parallel region of torch's; ops inside it take one thread each."""

    def __init__(self, openmp: ctypes.CDLL) -> None:
        self._openmp = openmp
        self._given: queue.SimpleQueue[tuple[Future[Any], Task] | None] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._given.put((future, functools.partial(fn, *args, **kwargs)))
        return future

    def run(self, conduct: Callable[[], R], workers: int) -> R:
        """`conduct` on the thread that calls, with the others at its service."""
        conductor, ended = threading.get_ident(), Future[R]()
        begun = threading.Event()
        done: list[float] = []

        def region(_: Any) -> None:
            torch.get_num_threads()  # a thread's first question sets its number to the process's
            self._openmp.omp_set_num_threads(1)  # of this thread, until the region ends: what libraries count on
            if threading.get_ident() != conductor:
                self.serve(begun)
                return
            try:
                begun.set()
                _done(ended, conduct)
                done.append(time.monotonic())
            finally:
                for _ in range(workers - 1):
                    self._given.put(None)

        self._openmp.GOMP_parallel(_REGION(region), None, workers, 0)
        if not done:  # an interrupt as the region began or ended, which a function called from C has nobody to tell
            raise KeyboardInterrupt
        global late, asked_again
        now = time.monotonic()
        late = late + 1 if now > done[-1] + LATE_S else 0
        if late > 1:
            asked_again = now + LATER_S
        return ended.result()

    def serve(self, begun: threading.Event) -> None:
        while True:
            try:
                given = self._given.get(timeout=None if begun.is_set() else SOON_S)
            except queue.Empty:
                if begun.is_set():
                    continue
                return
            if given is None:
                return
            _done(*given)


def _done(future: Future[R], work: Callable[[], R]) -> None:
    """The work, unless somebody has cancelled it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as fault:
        future.set_exception(fault)


def _pool(workers: int, share: int) -> ThreadPoolExecutor:
    """`workers` threads whose ops take `share` of torch's threads."""
    with _lock:
        found = _pools.get((workers, share))
        if found is None:
            found = ThreadPoolExecutor(workers, thread_name_prefix="sparsefeat")
            of_caller, begun = torch.get_num_threads(), threading.Barrier(workers + 1)

            def begin() -> None:
                torch.get_num_threads()  # the first question is answered with the process's number, which is kept
                torch.set_num_threads(share)
                begun.wait()

            for _ in range(workers):
                found.submit(begin)
            begun.wait()
            torch.set_num_threads(of_caller)
            _pools[workers, share] = found
        return found


def conducted(run: Callable[P, R]) -> Callable[P, R]:
    """`run`, of tensors on a CPU, on a thread that hands out its work by `together`, where torch may use several threads.
    Not of gradients: no graph is recorded."""

    @functools.wraps(run)
    def call(*args: P.args, **options: P.kwargs) -> R:
        of_torch = torch.get_num_threads()
        if of_torch == 1 or any(isinstance(one, torch.Tensor) and one.device.type != "cpu" for one in args):
            return run(*args, **options)
        workers, inference = min(of_torch, MOST_THREADS), torch.is_inference_mode_enabled()
        apart = of_torch > workers or _forked or time.monotonic() < asked_again
        torchs = None if apart else openmp()
        pool = _pool(workers, of_torch // workers) if torchs is None else Team(torchs)

        def conduct() -> R:
            outer = getattr(_conducting, "pool", (None, 1))
            _conducting.pool = pool, workers
            try:
                with torch.inference_mode(inference), torch.no_grad():
                    return run(*args, **options)
            finally:
                _conducting.pool = outer

        if isinstance(pool, Team):
            return pool.run(conduct, workers)
        running = pool.submit(conduct)
        try:
            return running.result()
        except BaseException:  # an interrupt of the caller's too: nothing may write on after it
            if not running.cancel():
                running.exception()
            raise

    return call


def threads() -> int:
    """How many pieces of work run at a time."""
    return getattr(_conducting, "pool", (None, 1))[1]


def together(tasks: Sequence[Task]) -> None:
    """Every task once, on several threads in a `conducted` call; returns when all are done. Tasks write to places of their
    own. The first exception ends the others' turn and is raised."""
    pool, workers = getattr(_conducting, "pool", (None, 1))
    if pool is None or len(tasks) < 2:
        for task in tasks:
            task()
        return
    left: Iterator[Task] = iter(tasks)
    taking, inference = threading.Lock(), torch.is_inference_mode_enabled()

    def work() -> None:
        with torch.inference_mode(inference), torch.no_grad():
            while True:
                with taking:
                    task = next(left, None)
                if task is None:
                    return
                try:
                    task()
                except BaseException:
                    with taking:
                        for _ in left:
                            pass
                    raise

    others = [pool.submit(work) for _ in range(min(workers, len(tasks)) - 1)]
    try:
        work()
    finally:
        # Threads that conduct other calls have not begun, and nothing is left for them.
        begun = [one for one in others if not one.cancel()]
        faults = [one.exception() for one in begun]
    for fault in faults:
        if fault is not None:
            raise fault


def shares(length: int, count: int, smallest: int = 1) -> list[slice]:
    """`length` things in so many pieces of nearly equal size, fewer where they would be smaller than `smallest`."""
    count = max(1, min(count, length // max(smallest, 1)))
    cuts = [length * i // count for i in range(count + 1)]
    return [slice(first, last) for first, last in itertools.pairwise(cuts)]


def pieces(length: int, smallest: int = 1, least: int = 1) -> list[slice]:
    """`shares` for the threads that there are, as many for each: PIECES_A_THREAD of them, one where a thread is alone, or
    what makes `least` together."""
    of_a_thread = max(PIECES_A_THREAD if threads() > 1 else 1, -(-least // threads()))
    return shares(length, of_a_thread * threads(), smallest)


def each(work: Callable[[Item], None], items: Iterable[Item]) -> list[Task]:
    """One task for every item."""
    return [functools.partial(work, item) for item in items]
