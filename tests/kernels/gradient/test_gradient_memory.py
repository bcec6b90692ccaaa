"""Gradients' memory is used again only when nobody can see it any more."""

import copy
import ctypes
import os
import signal
import threading

import pytest
import torch
from sparsefeat_kernels import (
    keep_gradient_memory,
    release_gradient_memory,
    sparse_decode,
    weight_gradient,
)
from sparsefeat_kernels.gradient import gradient_memory
from sparsefeat_kernels.gradient.gradient_memory import empty_gradient

LIKE = torch.ones(1)


@pytest.fixture(autouse=True)
def small_gradients_too(monkeypatch):
    """Without this, gradients of 32 MiB."""
    monkeypatch.setattr(gradient_memory, "SMALLEST", 1)
    monkeypatch.setattr(gradient_memory.sys, "platform", "linux")
    keep_gradient_memory(0)
    keep_gradient_memory(2)
    yield
    keep_gradient_memory(0)
    keep_gradient_memory(2)


def made(value: float, rows: int = 30) -> torch.Tensor:
    return empty_gradient(rows, 100, LIKE).fill_(value)


def test_memory_of_a_gradient_that_is_gone_is_used_again():
    first = made(1)
    address = first.data_ptr()
    del first
    assert made(2).data_ptr() == address


def test_released_memory_is_given_back_and_what_is_in_use_stays():
    held, gone = made(1), made(2)
    kept = [block.memory for block in gradient_memory._kept]
    del gone
    release_gradient_memory()
    assert [block.memory for block in gradient_memory._kept] == kept[:1]
    assert (held == 1).all()


HOLDS = {
    "itself": lambda t: t,
    "view": lambda t: t[3:, ::2],
    "detached": lambda t: t.detach(),
    "alias": lambda t: t.view(-1).as_strided((5,), (2,)),
    "parameter": torch.nn.Parameter,
    "numpy": lambda t: t.numpy(),
    "dlpack": lambda t: torch.from_dlpack(t),
    "storage": lambda t: t.untyped_storage(),
    "graph": lambda t: (torch.ones(30, 100, requires_grad=True) * t).sum(),
    "data": lambda t: torch.empty(0).set_(t.untyped_storage()),
    "shared": lambda t: t.share_memory_(),
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS)
def test_whatever_shares_a_gradient_keeps_its_memory(hold):
    gradient = made(7)
    address, held = gradient.data_ptr(), hold(gradient)
    del gradient
    others = [made(float(i)) for i in range(4)]
    if isinstance(held, torch.Tensor) and held.shape == (30, 100) and held.data_ptr() != address:
        assert (held == 7).all()  # moved elsewhere, as share_memory_ does
    else:
        assert all(other.data_ptr() != address for other in others)
        assert list((ctypes.c_float * 3000).from_address(address)) == 3000 * [7.0]


def test_gradients_that_are_kept_or_accumulated_stay_right():
    weight = torch.nn.Parameter(torch.zeros(40, 100))
    kept = []
    for value in (1.0, 2.0, 3.0, 4.0):
        coefficients, indices = torch.full((1, 1), value), torch.tensor([[5]])
        gradient, _ = weight_gradient(coefficients, indices, torch.ones(1, 100), torch.zeros(100), 40)
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
        kept.append((value, gradient.clone(), copy.copy(gradient)))
    for value, clone, same in kept[1:]:
        assert (clone[5] == value).all()
        assert torch.equal(clone, same)
    assert (weight.grad[5] == 10).all()
    assert (weight.grad[:5] == 0).all()


def test_what_was_left_in_the_memory_does_not_show():
    """Also where no latent is used, and in blocks of columns."""
    for active in (True, False):
        for d in (100, 3):
            gradient = empty_gradient(50, d, LIKE)
            gradient.fill_(torch.nan)
            del gradient
            coefficients, indices = torch.full((2, 1), 3.0 * active), torch.tensor([[5], [49]])
            weight, _ = weight_gradient(coefficients, indices, torch.ones(2, d), torch.zeros(d), 50)
            expected = torch.zeros(50, d)
            expected[[5, 49]] = 3.0 * active
            assert torch.equal(weight, expected)


def test_no_more_is_kept_than_was_asked_for():
    many = [made(i) for i in range(5)]
    assert len(gradient_memory._kept) == 2
    del many
    made(0, rows=31)  # another size takes the place of what is not used
    assert sorted(len(b.memory) for b in gradient_memory._kept) == [4 * 31 * 100]
    keep_gradient_memory(0)
    assert gradient_memory._kept == []
    made(1)
    assert gradient_memory._kept == []
    with pytest.raises(ValueError, match="blocks must be 0 or more, got -1"):
        keep_gradient_memory(-1)


def test_threads_never_share_memory():
    wrong = []

    def work(number: float) -> None:
        for _ in range(200):
            gradient = made(number)
            if not bool((gradient == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_compiled_step_gives_the_gradients_of_an_eager_one():
    g = torch.Generator().manual_seed(0)
    W, indices = torch.randn(40, 6, generator=g), torch.randint(40, (9, 3), generator=g)

    def step(values, W_dec):
        return sparse_decode(values, indices, W_dec, torch.zeros(6)).square().sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        for scale in (1.0, 2.0):
            parameter = W.clone().requires_grad_()
            run(torch.full((9, 3), scale), parameter).backward()
            results.append(parameter.grad)
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


def test_where_the_call_is_unknown_memory_is_ordinary(monkeypatch):
    monkeypatch.setattr(gradient_memory.sys, "platform", "win32")
    assert made(3).untyped_storage().resizable()
    assert gradient_memory._kept == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_process_forked_while_a_thread_takes_memory_can_take_some_too():
    with gradient_memory._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # waits for ever otherwise
            made(1)
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
