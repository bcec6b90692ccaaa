"""Kernel tests run on poisoned memory, and on both implementations where they ask for `path`."""

from collections.abc import Iterator

import pytest
import torch
from sparsefeat_kernels import force_triton
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.replay import forget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def memory(poisoned_memory: None) -> None:
    """Overridden where a test traces the program that allocates."""


@pytest.fixture(autouse=True)
def nothing_recorded() -> None:
    """On a GPU a test that changes what launches depend on would be given those of the one before."""
    forget()


@pytest.fixture(params=["cpu", "triton"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device to put tensors on; ops take the CPU implementation or the Triton launcher (interpreted without a GPU)."""
    if request.param == "cpu":
        yield "cpu"
        return
    if not TRITON_AVAILABLE:
        pytest.skip("Triton is not installed")
    with force_triton():
        yield DEVICE


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The profiler sees the memory of the thread that it was started in: here that is all of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
