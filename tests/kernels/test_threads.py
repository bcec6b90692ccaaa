"""Whole pieces of work for a thread: all are done, on threads with their share of torch's, and answers do not depend on how
many threads there are."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sparsefeat_kernels
import torch
from sparsefeat_kernels import (
    attention_with_map_,
    auxk_encode,
    bf16_products,
    concept_attention,
    prepare_encoder,
    resize_add_,
    threshold_encode,
    topk_encode,
)
from sparsefeat_kernels import threads as kernels_threads
from sparsefeat_kernels.threads import Team, conducted, each, pieces, shares
from sparsefeat_kernels.threads import together as together_inside
from torch import Tensor

together = conducted(together_inside)


@pytest.fixture(params=[(1, "torch's"), (2, "torch's"), (2, "Python's"), (3, "torch's"), (3, "Python's")], ids=str)
def torch_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    count, whose = request.param
    take_threads(whose, monkeypatch)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield count
    torch.set_num_threads(before)


def take_threads(whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_threads, "asked_again", 0.0)
    monkeypatch.setattr(kernels_threads, "late", 0)
    if whose == "Python's":
        monkeypatch.setattr(kernels_threads, "openmp", lambda: None)
    elif kernels_threads.openmp() is None:
        pytest.skip("torch's threads cannot be asked here: it does not bring GNU's OpenMP along")


@contextlib.contextmanager
def ops_outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts of the ATen ops that the caller's thread runs, but those of a region that it shares with others."""
    inner = Team.run

    def marked(self: Team, conduct: Callable[[], object], workers: int) -> object:
        with torch.profiler.record_function("region"):
            return inner(self, conduct, workers)

    monkeypatch.setattr(Team, "run", marked)
    counts: dict[str, int] = {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:  # of this thread
        yield counts
    for event in profile.events():
        above = event
        while above is not None and above.name != "region":
            above = above.cpu_parent
        if above is None and event.name.startswith("aten::"):
            counts[event.name] = counts.get(event.name, 0) + 1


@pytest.mark.parametrize(("length", "count", "smallest"), [(0, 3, 1), (1, 4, 1), (10, 3, 1), (10, 4, 4), (7, 7, 2)])
def test_shares_cover_everything_once_in_nearly_equal_pieces(length: int, count: int, smallest: int):
    found = shares(length, count, smallest)
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(length))
    sizes = [part.stop - part.start for part in found]
    assert len(found) <= count
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= min(smallest, length)


@pytest.mark.parametrize(("least", "wanted"), [(1, (1, 8, 12)), (8, (8, 8, 12)), (9, (9, 10, 12)), (13, (13, 14, 15))])
def test_every_thread_has_as_many_pieces(least: int, wanted: tuple[int, ...], torch_threads: int):
    """A piece more would be waited for by the threads that have none of it."""
    found: list[slice] = []
    conducted(lambda: found.extend(pieces(1000, least=least)))()
    assert len(found) == wanted[torch_threads - 1]
    assert [i for part in found for i in range(part.start, part.stop)] == list(range(1000))


def test_every_task_runs_once_with_its_share_of_torchs_threads(torch_threads: int):
    done, inside = [], set()

    def work(i: int) -> None:
        inside.add((torch.get_num_threads(), torch.is_grad_enabled() and torch_threads > 1))
        done.append(i)

    together(each(work, range(50)))
    together([])
    assert sorted(done) == list(range(50))
    assert inside == {(1, False)}
    assert torch.get_num_threads() == torch_threads
    seen = []
    fresh = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    fresh.start()
    fresh.join()
    assert seen == [torch_threads]


def test_an_exception_is_raised_when_nobody_works_any_more(torch_threads: int):
    working, begun = [0], []

    def work(i: int) -> None:
        begun.append(i)
        working[0] += 1
        try:
            if i == 2:
                raise ValueError("the third")
            time.sleep(0.01)
        finally:
            working[0] -= 1

    with pytest.raises(ValueError, match="the third"):
        together(each(work, range(1000)))
    assert working == [0]
    assert len(begun) < 600  # however long the thread that failed is put aside
    together(each(begun.append, range(3)))  # and the threads go on


def test_calls_from_several_threads_and_from_inside_a_task(torch_threads: int):
    counts = [0] * 4

    def caller(i: int) -> None:
        def outer(_: int) -> None:
            together(each(lambda _: counts.__setitem__(i, counts[i] + 1), range(5)))

        for _ in range(3):
            together([lambda: outer(0)])

    callers = [threading.Thread(target=caller, args=(i,)) for i in range(4)]
    for one in callers:
        one.start()
    for one in callers:
        one.join(300)
    assert counts == [15] * 4


def test_after_two_regions_that_waited_for_their_threads_they_are_not_asked_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
):
    take_threads("torch's", monkeypatch)
    monkeypatch.setattr(kernels_threads, "LATER_S", 0.3)
    regions, serve, run = [], Team.serve, Team.run
    monkeypatch.setattr(Team, "run", lambda *given: regions.append(1) or run(*given))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Team, "serve", lambda *given: serve(*given) or time.sleep(0.02))
            for _ in range(2):
                together(each(lambda _: None, range(4)))
        asked = len(regions)
        done: list[int] = []
        together(each(done.append, range(4)))
        assert (asked, len(regions), sorted(done)) == (2, 2, [0, 1, 2, 3])
        time.sleep(0.3)
        together(each(done.append, range(4)))
        assert (len(regions), len(done)) == (3, 8)
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_as_the_region_begins_ends_the_call(monkeypatch: pytest.MonkeyPatch):
    take_threads("torch's", monkeypatch)
    monkeypatch.setattr(kernels_threads, "SOON_S", 0.1)
    before, asked, caller = torch.get_num_threads(), [], threading.get_ident()
    torch.set_num_threads(2)
    number = torch.get_num_threads

    def interrupted() -> int:
        asked.append(threading.get_ident())
        if asked.count(caller) == 2:  # the first question is whether there are threads
            raise KeyboardInterrupt
        return number()

    try:
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", interrupted)
            with pytest.raises(KeyboardInterrupt):
                together(each(lambda _: None, range(4)))
        done: list[int] = []
        together(each(done.append, range(4)))
        assert sorted(done) == [0, 1, 2, 3]
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together(each(lambda _: None, range(4)))
        child = os.fork()
        if child == 0:
            done: list[int] = []
            together(each(done.append, range(4)))
            os._exit(0 if sorted(done) == [0, 1, 2, 3] else 1)
        for _ in range(6000):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            time.sleep(0.05)
        else:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked process waits for threads that it has not")
        assert status == 0
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------- of the ops

ROWS, D, N, K = 400, 160, 4096, 8


def problem() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    W = torch.randn(N, D, generator=g) / D**0.5
    return torch.randn(ROWS, D, generator=g), W, 0.1 * torch.randn(N, generator=g), 0.1 * torch.randn(D, generator=g)


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")
@pytest.mark.parametrize("op", ["prepared", "plain", "threshold", "auxk"])
def test_codes_do_not_depend_on_the_number_of_threads(op: str):
    x, W, b, c = problem()
    calls = {
        "prepared": lambda: topk_encode(x, W, b, c, K, prepared=prepare_encoder(W, b)),
        "plain": lambda: topk_encode(x, W, b, c, K),
        "threshold": lambda: threshold_encode(x, W, b, c, torch.tensor(2.0), 300),
        "auxk": lambda: auxk_encode(x, W, b, c, K, torch.arange(0, N, 3), 20),
    }
    before, answers = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            answers.append(calls[op]())
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        assert torch.equal(answers[0][1], other[1])
        torch.testing.assert_close(answers[0][0], other[0], rtol=1e-6, atol=1e-6)
    assert torch.equal(answers[1][0], answers[3][0])


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")
@pytest.mark.parametrize("whose", ["torch's", "Python's"])
def test_a_call_waits_for_its_threads_a_few_times_and_the_caller_runs_few_ops(
    whose: str, monkeypatch: pytest.MonkeyPatch
):
    """Beside other programs every wait may cost milliseconds, and every op on torch's threads is one. One batch of two
    chunks: rounding, twice product and survivors, rescoring, the codes."""
    from sparsefeat_kernels.encode import survivors

    take_threads(whose, monkeypatch)
    x, W, b, c = problem()
    prepared = prepare_encoder(W, b)
    monkeypatch.setattr(survivors, "PREACTIVATION_BYTES", 2 * N * ROWS // 2)
    phases = []
    inner = survivors.together
    monkeypatch.setattr(survivors, "together", lambda tasks: phases.append(len(tasks)) or inner(tasks))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        topk_encode(x, W, b, c, K, prepared=prepared)
        phases.clear()
        with ops_outside(monkeypatch) as outside:
            topk_encode(x, W, b, c, K, prepared=prepared)
    finally:
        torch.set_num_threads(before)
    assert len(phases) == 7
    assert max(phases) <= 16
    # Slices and views are most of them.
    large = ("aten::mm", "aten::addmm", "aten::amax", "aten::topk", "aten::index", "aten::copy_", "aten::sub")
    assert sum(outside.values()) < 250
    assert sum(outside.get(name, 0) for name in large) < 12


@pytest.mark.parametrize("whose", ["torch's", "Python's"])
@pytest.mark.parametrize("op", ["attention_map", "concept_attention", "concept_attention of bfloat16", "resize_add"])
def test_an_attention_is_handed_out_once_and_the_caller_runs_few_ops(
    op: str, whose: str, monkeypatch: pytest.MonkeyPatch
):
    """Whole pieces of it: positions with all their heads, or heads with all their keys."""
    from sparsefeat_kernels.attention import concept, map_cpu, resize

    take_threads(whose, monkeypatch)
    monkeypatch.setattr(map_cpu, "CONDUCTED_SCORES", 0)
    g = torch.Generator().manual_seed(3)
    q = torch.randn(2, 8, 3100, 24, generator=g)
    k, v, own = (torch.randn(2, 8, 9, 24, generator=g) for _ in range(3))
    maps = torch.zeros(2, 3100, 9)
    enlarged = torch.rand(20, 6, 16, 16, generator=g)
    given = own, k, v, q, q

    def added(op: Callable[..., None], into: tuple[int, ...], *given: Tensor | bool | None) -> Tensor:
        op(sums := torch.zeros(into), *given)
        return sums

    half = [tensor.bfloat16() for tensor in given]
    module, call = {
        "attention_map": (map_cpu, lambda: attention_with_map_(maps, q, k, v)),
        "concept_attention": (concept, lambda: concept_attention(*given)),
        "concept_attention of bfloat16": (concept, lambda: concept_attention(*half)),
        "resize_add": (resize, lambda: added(resize_add_, (6, 128, 128), enlarged, None, True)),
    }[op]
    phases = []
    inner = module.together
    monkeypatch.setattr(module, "together", lambda tasks: phases.append(len(tasks)) or inner(tasks))
    before = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            call()
            phases.clear()
            with ops_outside(monkeypatch) as outside:
                answers.append(call())
            assert len(phases) == 1
            assert count <= phases[0] <= 4 * count
            if count > 1:
                assert sum(outside.values()) < 20
    finally:
        torch.set_num_threads(before)
    for other in answers[1:]:
        torch.testing.assert_close(answers[0], other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("short", [0, 1], ids=["from it on", "below"])
def test_both_sides_of_the_size_from_which_maps_are_handed_out(short: int, monkeypatch: pytest.MonkeyPatch):
    from sparsefeat_kernels.attention import resize

    maps = torch.rand(3, 2, 4, 4)
    monkeypatch.setattr(resize, "CONDUCTED_BYTES", 4 * 3 * 2 * 8 * 8 + short)
    inner, handed_out = resize.together, []
    monkeypatch.setattr(resize, "together", lambda tasks: handed_out.append(len(tasks)) or inner(tasks))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        resize_add_(torch.zeros(2, 8, 8), maps, None, True)
    finally:
        torch.set_num_threads(before)
    assert handed_out == [1 if short else 2]


SCRATCH = """
import resource, sys, torch
import sparsefeat_kernels as kernels
torch.set_num_threads(2)
g = torch.Generator().manual_seed(0)
x, W = torch.randn(3000, 128, generator=g), torch.randn(8192, 128, generator=g)
b, c = torch.zeros(8192), torch.zeros(128)
def call(rows):
    kernels.topk_encode(x[:rows], W, b, c, 16)
    kernels.threshold_encode(x[:rows], W, b, c, torch.tensor(35.0), 64)
call(32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
call(3000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kilobytes of ru_maxrss")
def test_the_scratch_of_all_threads_together_is_bounded():
    """98 MB of pre-activations in fp32, 49 MB of products in bf16. What malloc keeps for each thread comes on top."""
    paths = os.pathsep.join([str(Path(sparsefeat_kernels.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run(
        [sys.executable, "-c", SCRATCH],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(child.stdout) < (64 + 16) << 10
