"""The fp32 product of either library is the product."""

import pytest
import torch
from sparsefeat_kernels.products import product


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_strides_give_the_product_at_full_precision(enabled, dtype):
    g = torch.Generator().manual_seed(0)
    rows, n, d = 37, 53, 129
    x, W, bias = (torch.randn(size, generator=g, dtype=dtype) for size in ((rows, d), (n, d), (n,)))
    wide = torch.cat([x, x], 1)
    expected, terms = x.double() @ W.double().T, x.double().abs() @ W.double().abs().T
    with torch.backends.mkldnn.flags(enabled=enabled):
        for left, right in ((x, W), (x.T.contiguous().T, W), (x, W.T.contiguous().T), (wide[:, :d], W)):
            for added in (None, bias):
                found = product(left, right, added).double()
                exact = expected if added is None else expected + bias.double()
                assert ((found - exact).abs() <= (d + 1) * torch.finfo(dtype).eps * (terms + 1)).all()
                assert torch.equal(found, product(left, right, added).double())


def test_empty_operands_and_infinities():
    assert product(torch.ones(0, 3), torch.ones(4, 3)).shape == (0, 4)
    assert torch.equal(product(torch.ones(2, 0), torch.ones(4, 0)), torch.zeros(2, 4))
    found = product(torch.tensor([[torch.inf, 1.0], [torch.nan, 1.0], [1.0, 1.0]]), torch.ones(3, 2))
    assert found[0].isinf().all()
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_does_not_reach_it(enabled):
    g = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(size, generator=g) for size in ((37, 129), (53, 129), (53,)))
    with torch.backends.mkldnn.flags(enabled=enabled):
        expected = product(x, W, bias)
        with torch.autocast("cpu", torch.bfloat16):
            found = product(x, W, bias)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
