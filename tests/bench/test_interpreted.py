"""The hastened interpreter computes what Triton says: reductions in order along their axis, and shapes that are broadcast."""

import numpy as np
import pytest
import torch
from sparsefeat_kernels import dispatch

pytest.importorskip("triton", reason="Triton is not installed")
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="kernels are not interpreted here")


@triton.jit
def halved_and_added(a, b):
    return a * 0.5 + b


@triton.jit
def larger_or_first(value, place, other_value, other_place):
    other = other_value > value
    return tl.where(other, other_value, value), tl.where(other, other_place, place)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, AXIS: tl.constexpr, KEEP: tl.constexpr, OUT: tl.constexpr):
    x = tl.load(x_ptr + tl.reshape(tl.arange(0, 64), [2, 4, 8]))  # [2, 4, 8]
    found = tl.reduce(x, AXIS, halved_and_added, keep_dims=KEEP)
    tl.store(out_ptr + tl.arange(0, OUT), tl.reshape(found, [OUT]))


@triton.jit
def _largest_kernel(x_ptr, value_ptr, place_ptr):
    at = tl.arange(0, 32)
    value, place = tl.reduce((tl.load(x_ptr + at), at), 0, larger_or_first)  # of scalars
    tl.store(value_ptr, value)
    tl.store(place_ptr, place)


@triton.jit
def _outer_kernel(a_ptr, b_ptr, out_ptr):
    row, column = tl.arange(0, 4), tl.arange(0, 8)
    a, b = tl.load(a_ptr + row), tl.load(b_ptr + column)
    total = a[:, None] - b[None, :]  # [4, 8]
    total = total * total + a[:, None] + 1
    tl.store(out_ptr + row[:, None] * 8 + column[None, :], total)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_reduction_by_a_function_that_does_not_commute_goes_along_its_axis_from_the_first(axis, keep):
    x = torch.randn(2, 4, 8)
    expected, *rest = np.moveaxis(x.double().numpy(), axis, 0)
    for part in rest:
        expected = expected * 0.5 + part
    out = torch.full((expected.size,), torch.nan)
    _reduce_kernel[(1,)](x, out, axis, keep, expected.size)
    torch.testing.assert_close(out.double(), torch.from_numpy(expected).flatten(), rtol=1e-6, atol=1e-6)


def test_values_and_places_that_are_reduced_together_to_scalars_are_the_first_of_the_largest():
    x = torch.randint(0, 3, (32,)).float()
    value, place = torch.empty(1), torch.empty(1, dtype=torch.int32)
    _largest_kernel[(1,)](x, value, place)
    assert value.item() == x.max().item()
    assert place.item() == np.flatnonzero(x.numpy() == x.max().item())[0]


def test_blocks_of_other_shapes_are_broadcast():
    a, b, out = torch.randn(4), torch.randn(8), torch.empty(4, 8)
    _outer_kernel[(1,)](a, b, out)
    expected = (a.double()[:, None] - b.double()).square() + a.double()[:, None] + 1
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
