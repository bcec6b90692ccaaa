"""feature_stats_ against its loop over entries, with runs that cross the kernel's blocks."""

import importlib

import pytest
import torch
from sparsefeat_kernels import feature_stats_
from sparsefeat_kernels.dispatch import INTERPRETED, TRITON_AVAILABLE
from sparsefeat_kernels.feature_stats import reference
from sparsefeat_kernels.gradient import csr
from torch import Tensor

from tests.kernels.launches import launches

feature_stats = importlib.import_module("sparsefeat_kernels.feature_stats")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of tests that call the launcher itself


def problem(rows: int, k: int, n: int, groups: int, device: str, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=g)
    values[torch.rand(rows, k, generator=g) < 0.2] = 0
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int()
    group = torch.randint(-1, groups, (rows,), generator=g).int()
    tables = torch.zeros(groups, n), torch.zeros(groups, n, dtype=torch.int32), torch.full((groups, n), -torch.inf)
    return [t.to(device) for t in (*tables, values, indices, group)]


def assert_is_reference(arguments: list[Tensor], before: list[Tensor]) -> None:
    expected = reference(*(t.double() if t.is_floating_point() else t for t in before))
    torch.testing.assert_close(arguments[0].double(), expected[0], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(arguments[1], expected[1])
    torch.testing.assert_close(arguments[2].double(), expected[2], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(7, 3, 10, 2), (1, 1, 1, 1), (40, 2, 3, 1)], ids=str)
def test_two_batches_add_up(path: str, shape: tuple[int, int, int, int]):
    arguments = problem(*shape, path)
    for seed in (0, 1):
        arguments[3:] = problem(*shape, path, seed)[3:]
        before = [t.clone() for t in arguments]
        feature_stats_(*arguments)
        assert_is_reference(arguments, before)


@pytest.mark.parametrize("smallest", [0.0, -0.0, 1e-40, -1e-40, 0.5, -0.5, torch.nan])
def test_both_sides_of_the_smallest_value_from_which_zeros_are_told_by_their_bits(smallest: float):
    arguments = problem(30, 4, 9, 2, "cpu")
    arguments[3] = arguments[3].abs()
    arguments[3][::3, 1] = smallest
    before = [t.clone() for t in arguments]
    feature_stats_(*arguments)
    assert_is_reference(arguments, before)


@pytest.mark.parametrize("out_of_range", [False, True])
def test_codes_of_any_strides(path: str, out_of_range: bool):
    arguments = problem(30, 4, 9, 2, path)
    arguments[5].clamp_(min=0)
    if out_of_range:
        arguments[4][3, 1] = 9
    arguments[3:5] = [t.T.contiguous().T for t in arguments[3:5]]
    before = [t.clone() for t in arguments]
    feature_stats_(*arguments)
    assert_is_reference(arguments, before)


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
def test_runs_longer_than_a_block_are_joined_in_order():
    # 40 rows of latents 0, 1 and 2 of 3, in blocks of 8 entries: runs of up to 40 cross several blocks.
    arguments = problem(40, 3, 3, 2, DEVICE)
    before = [t.clone() for t in arguments]
    feature_stats._feature_stats_triton(*arguments, block=8)
    assert_is_reference(arguments, before)
    again = [t.clone() for t in before]
    feature_stats._feature_stats_triton(*again, block=8)
    assert all(torch.equal(a, b) for a, b in zip(arguments, again, strict=True))


@pytest.mark.skipif(not (TRITON_AVAILABLE and INTERPRETED), reason="needs Triton's interpreter")
def test_a_batch_is_one_sort_and_three_launches(monkeypatch):
    sizes = ((40, 20480), torch.float32), ((40, 20480), torch.int32), ((40, 20480), torch.float32)
    sizes += ((4096, 32), torch.float32), ((4096, 32), torch.int32), ((4096,), torch.int64)
    arguments = [torch.empty(size, dtype=dtype, device="meta") for size, dtype in sizes]
    with launches(monkeypatch, csr, feature_stats) as launched:
        feature_stats._feature_stats_triton(*arguments)
    assert launched == ["_entry_keys_kernel", "sort", "_feature_stats_scan_kernel", "_feature_stats_join_kernel"]


def test_nan_reaches_its_own_statistics_only(path: str):
    arguments = problem(6, 2, 5, 1, path)
    arguments[5].zero_()
    arguments[3][2, 0] = torch.nan
    before = [t.clone() for t in arguments]
    feature_stats_(*arguments)
    assert_is_reference(arguments, before)


def test_what_is_out_of_range_is_skipped(path: str):
    arguments = problem(6, 2, 5, 2, path)
    arguments[5][1] = 2  # no such group
    arguments[4][0, 0] = 5  # no such latent
    arguments[4][3, 1] = -1
    before = [t.clone() for t in arguments]
    feature_stats_(*arguments)
    before[3][0, 0] = before[3][3, 1] = 0
    before[5][1] = -1
    assert_is_reference(arguments, before)


def test_no_rows(path: str):
    sum, count, maximum, values, indices, group = problem(6, 2, 5, 2, path)
    feature_stats_(sum, count, maximum, values[:0], indices[:0], group[:0])
    assert count.sum() == 0


MISTAKES = {
    "sum": (0, lambda t: t.double()),
    "count": (1, lambda t: t.long()),
    "maximum": (2, lambda t: t[:, :-1]),
    "maximum must be contiguous": (2, lambda t: t.T.contiguous().T),
    "values must": (3, lambda t: t.half()),
    "group": (5, lambda t: t[:-1]),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    position, change = MISTAKES[named]
    arguments = problem(6, 2, 5, 2, "cpu")
    arguments[position] = change(arguments[position])
    with pytest.raises((ValueError, TypeError), match=named):
        feature_stats_(*arguments)
