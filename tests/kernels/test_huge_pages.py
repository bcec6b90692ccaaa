"""Zeros in huge pages are zeros like any others."""

import pickle

import pytest
import torch
from sparsefeat_kernels import huge_pages
from sparsefeat_kernels.csr import reference, weight_gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_large_and_small_ones_are_tensors_of_zeros_that_can_be_written(dtype):
    for size in ((0, 3), (5, 7), (9000, 4099)):
        z = huge_pages.zeros(size, dtype, torch.device("cpu"))
        assert (z.shape, z.dtype) == (size, dtype)
        assert z.is_contiguous()
        assert not z.any()
        z += 1
        assert (z == 1).all()
        if z.numel() < 100:
            assert torch.equal(pickle.loads(pickle.dumps(z)), z)


def test_a_gradient_in_huge_pages_outlives_everything_it_was_made_from(monkeypatch):
    monkeypatch.setattr(huge_pages, "SMALLEST", 1)
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(6, 11, generator=g), torch.randn(40, 11, generator=g).requires_grad_()
    code, indices = torch.randn(6, 3, generator=g), torch.randint(0, 40, (6, 3), generator=g).int()
    (torch.ops.sparsefeat.sparse_decode(code, indices, W, torch.zeros(11)) * x).sum().backward()
    expected = reference(code.double(), indices, x.double(), torch.zeros(11).double(), 40)[0]
    torch.testing.assert_close(W.grad.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        W.grad.mul_(2)
    torch.testing.assert_close(W.grad.double(), 2 * expected, rtol=1e-5, atol=1e-6)
    assert weight_gradient(code, indices, x, torch.zeros(11), 40)[0].shape == (40, 11)
