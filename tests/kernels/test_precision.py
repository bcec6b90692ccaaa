"""Whatever a process allows torch, an op's fp32 products are of fp32, and the settings are as they were."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sparsefeat_kernels import concept_map_
from sparsefeat_kernels.attention import concept_map
from sparsefeat_kernels.precision import products_are_rounded, whole_products

cuda = torch.backends.cuda.matmul
cpu = getattr(torch.backends.mkldnn, "matmul", None)
by_device = pytest.mark.skipif(not hasattr(cuda, "fp32_precision") or cpu is None, reason="torch before 2.9")


def set_to(owner: Any, name: str, value: Any) -> Callable[[], None]:
    return lambda: setattr(owner, name, value)


ALLOWED = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": set_to(cuda, "allow_tf32", True),
}
BY_DEVICE = {
    "cuda": set_to(cuda, "fp32_precision", "tf32"),
    "cpu": set_to(cpu, "fp32_precision", "bf16"),
    "all": set_to(torch.backends, "fp32_precision", "tf32"),
}
ROUNDED = {"high": "both", "medium": "both", "allow_tf32": "cuda", "cuda": "cuda", "cpu": "cpu", "all": "both"}


def settings() -> list[Any]:
    """All that torch says of them; which of its names may not be asked, too."""
    found: list[Any] = []
    for asked in (
        torch.get_float32_matmul_precision,
        lambda: cuda.allow_tf32,
        lambda: cuda.fp32_precision,
        lambda: cpu.fp32_precision,
        lambda: torch.backends.fp32_precision,
    ):
        try:
            found.append(asked())
        except (RuntimeError, AttributeError) as error:
            found.append(type(error))
    return found


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")
    if cpu is not None and hasattr(cuda, "fp32_precision"):
        for owner in (torch.backends, cuda, cpu):
            owner.fp32_precision = "none"


def run_op(seen: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    inner = concept_map.product
    monkeypatch.setattr(concept_map, "product", lambda *given: seen() or inner(*given))
    output, maps = torch.rand(1, 2, 5, 4), torch.zeros(1, 5, 3)
    concept_map_(maps, output, output[:, :, :3])
    return maps


@pytest.mark.parametrize("allowed", [*ALLOWED, *(pytest.param(name, marks=by_device) for name in BY_DEVICE)])
def test_an_op_multiplies_fp32_as_it_is_and_leaves_the_settings(allowed: str, monkeypatch: pytest.MonkeyPatch):
    (ALLOWED | BY_DEVICE)[allowed]()
    rounds = ["cpu", "cuda"] if ROUNDED[allowed] == "both" else [ROUNDED[allowed]]
    if hasattr(cuda, "fp32_precision") and cpu is not None:
        assert [device for device in ("cpu", "cuda") if products_are_rounded(device)] == rounds
    before, inside = settings(), []
    run_op(lambda: inside.append(products_are_rounded("cpu")), monkeypatch)
    with whole_products():
        inside += [products_are_rounded("cpu"), products_are_rounded("cuda")]
    assert inside == [False, False, False]
    assert settings() == before


def test_they_are_put_back_after_an_exception_and_by_the_last_of_several(monkeypatch: pytest.MonkeyPatch):
    torch.set_float32_matmul_precision("medium")
    before = settings()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_op(fail, monkeypatch)
    assert settings() == before

    first_left, second_in = threading.Event(), threading.Event()
    inside = []

    def second() -> None:
        with whole_products():
            second_in.set()
            first_left.wait(10)
            inside.append(products_are_rounded("cpu"))

    other = threading.Thread(target=second)
    with whole_products():
        other.start()
        assert second_in.wait(10)
    first_left.set()
    other.join()
    assert inside == [False]
    assert settings() == before
