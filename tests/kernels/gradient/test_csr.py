"""The latent-major view, and the weight gradient on it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import force_triton
from sparsefeat_kernels.dispatch import INTERPRETED, TRITON_AVAILABLE
from sparsefeat_kernels.gradient import csr
from sparsefeat_kernels.gradient import weight_gradient as gradient
from sparsefeat_kernels.gradient.csr import latent_major, sorted_entries
from sparsefeat_kernels.gradient.weight_gradient import reference, weight_gradient

from tests.kernels.launches import launches

kernels = pytest.mark.skipif(not (TRITON_AVAILABLE and INTERPRETED), reason="needs Triton's interpreter")


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 6), st.integers(1, 12))
def test_every_latent_owns_its_entries_in_row_order(seed: int, rows: int, k: int, n: int):
    g = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, n + 1, (rows, k), generator=g, dtype=torch.int32)  # some out of range
    values = torch.randint(-1, 3, (rows, k), generator=g).float()
    row_ids, order, offsets = latent_major(indices, values, n)
    assert sorted(order.tolist()) == list(range(rows * k))
    for latent in range(n):
        owned = order[offsets[latent] : offsets[latent + 1]]
        expected = ((indices == latent) & (values != 0)).flatten().nonzero()[:, 0]
        assert torch.equal(owned, expected)  # positions ascend: stable
        assert torch.equal(row_ids[offsets[latent] : offsets[latent + 1]], owned // k)


@kernels
@pytest.mark.parametrize(
    ("n", "groups", "dtype"), [(7, 1, torch.int16), (7, 5000, torch.int32), (7, 2**30, torch.int64)]
)
@pytest.mark.parametrize("wide", [torch.int32, torch.int64])
def test_sorted_entries_are_in_order_of_group_latent_and_row(n, groups, dtype, wide):
    """Strided views too, and what is out of range in either."""
    g = torch.Generator().manual_seed(groups)
    indices = torch.randint(-1, n + 1, (6, 4), generator=g, dtype=wide).T
    values = torch.randint(-1, 2, (8, 6), generator=g).float()[::2]
    values[1, 1] = torch.nan
    group = torch.tensor([0, -1, groups, groups - 1], dtype=wide) if groups > 1 else None
    keys, order = sorted_entries(values, indices, n, group, groups)
    own = torch.zeros(4, dtype=torch.int64) if group is None else group.long()
    counts = (values != 0) & (indices >= 0) & (indices < n) & (own >= 0)[:, None] & (own < groups)[:, None]
    exact = torch.where(counts, own[:, None] * n + indices, groups * n).flatten()
    assert keys.dtype == dtype
    assert torch.equal(order, torch.tensor(sorted(range(24), key=lambda e: (int(exact[e]), e))))
    assert torch.equal(keys.long(), exact[order])


@kernels
@pytest.mark.parametrize("own_sums", [False, True])
def test_the_launches_of_a_weight_gradient(own_sums, monkeypatch):
    """Seven, however many entries; six where one program sums them all."""
    rows = 4096 if own_sums else 4
    code = torch.empty(rows, 32, device="meta"), torch.empty(rows, 32, dtype=torch.int32, device="meta")
    x, shift = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((rows, 1280), (1280,)))
    with force_triton(), launches(monkeypatch, csr, gradient) as launched:
        gradient._weight_gradient_triton(*code, x, shift, 20480)
    kernels = ["_weight_gradient_entries_kernel", "_weight_gradient_segment_kernel", "_weight_gradient_join_kernel"]
    assert launched == ["new_zeros"] * 2 + ["_entry_keys_kernel", "sort"] + kernels[: 3 if own_sums else 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_gradient_is_the_dense_product(path: str, dtype: torch.dtype):
    g = torch.Generator().manual_seed(1)
    rows, k, n, d = 13, 3, 6, 9
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int().to(path)
    coefficients = torch.randn(rows, k, generator=g).to(path)
    x, shift = (torch.randn(s, generator=g).to(dtype).to(path) for s in ((rows, d), (d,)))
    weight, bias = weight_gradient(coefficients, indices, x, shift, n)
    assert weight.dtype == dtype
    expected_weight, expected_bias = reference(coefficients.double(), indices, x.double(), shift.double(), n)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    torch.testing.assert_close(weight.double(), expected_weight, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(bias.double(), expected_bias, rtol=1e-5, atol=1e-5)
    again = weight_gradient(coefficients, indices, x, shift, n)
    assert torch.equal(weight, again[0])
    assert torch.equal(bias, again[1])


def test_weight_gradient_in_blocks_of_columns(monkeypatch):
    monkeypatch.setitem(weight_gradient.__globals__, "CENTRED_BYTES", 100)
    indices, coefficients = torch.tensor([[0, 2], [2, 1]]).int(), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    x, shift = torch.arange(22.0).view(2, 11), torch.ones(11)
    torch.testing.assert_close(
        weight_gradient(coefficients, indices, x, shift, 4), reference(coefficients, indices, x, shift, 4)
    )


def test_weight_gradient_in_blocks_of_latents(monkeypatch):
    """Blocks in which no latent is used, one latent alone, and a last one that is short."""
    monkeypatch.setitem(weight_gradient.__globals__, "RESULT_BYTES", 4 * 5 * 3)
    g = torch.Generator().manual_seed(2)
    indices = torch.tensor([[0, 6], [7, 6], [19, 0]]).int()
    coefficients, x, shift = (torch.randn(size, generator=g) for size in ((3, 2), (3, 5), (5,)))
    for n in (20, 21, 24):  # blocks of 3
        expected = reference(coefficients.double(), indices, x.double(), shift.double(), n)
        for got, exact in zip(weight_gradient(coefficients, indices, x, shift, n), expected, strict=True):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rows", "n", "segment"), [(17, 5, 3), (23, 1, 4), (9, 64, 1), (40, 3, 8), (31, 2, 60)])
def test_latents_that_fire_on_most_rows_are_summed_in_segments(path: str, monkeypatch, rows, n, segment):
    monkeypatch.setitem(weight_gradient.__globals__, "SEGMENT", segment)
    g = torch.Generator().manual_seed(rows)
    indices = torch.randint(0, n, (rows, 2), generator=g).int()
    indices[:, 0] = 0  # on every row
    coefficients = torch.randn(rows, 2, generator=g)
    coefficients[1, 1] = 0
    x, shift = torch.randn(rows, 37, generator=g), torch.randn(37, generator=g)
    found = weight_gradient(*(t.to(path) for t in (coefficients, indices, x, shift)), n)
    expected = reference(coefficients.double(), indices, x.double(), shift.double(), n)
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-5)


def test_nan_reaches_the_latents_of_its_row_alone(path: str):
    """Also where a program sums several latents one after the other; row 3 is of no latent."""
    indices = torch.tensor([[0, 2], [1, 4], [4, 5], [9, 9]]).int().to(path)
    values = torch.tensor([[1.0, 2.0], [3.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).to(path)
    x, shift = torch.arange(12.0).view(4, 3).to(path), torch.zeros(3).to(path)
    x[1, 1], x[3] = torch.nan, torch.nan
    weight, bias = weight_gradient(values, indices, x, shift, 6)
    assert weight.isnan().nonzero().tolist() == [[1, 1], [4, 1]]
    assert bias.tolist() == [1, 3, 2, 0, 2, 0]


def test_nothing_active(path: str):
    indices, zeros = torch.zeros(2, 3, dtype=torch.int32, device=path), torch.zeros(2, 3, device=path)
    for rows in (0, 2):
        weight, bias = weight_gradient(
            zeros[:rows], indices[:rows], torch.ones(rows, 4, device=path), torch.zeros(4, device=path), 5
        )
        assert torch.equal(weight, torch.zeros(5, 4, device=path))
        assert torch.equal(bias, torch.zeros(5, device=path))
