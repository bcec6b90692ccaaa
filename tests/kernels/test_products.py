"""The fp32 product of either library is the product."""

import pytest
import torch
from sparsefeat_kernels.products import product
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_strides_give_the_product_at_full_precision(enabled, dtype):
    g = torch.Generator().manual_seed(0)
    rows, n, d = 37, 53, 129
    x, W, bias = (torch.randn(size, generator=g, dtype=dtype) for size in ((rows, d), (n, d), (n,)))
    wide, with_gaps = torch.cat([x, x], 1), torch.cat([W, W], 1)[:, :d]
    of_columns = torch.cat([W, W]).T.contiguous()[:, :n].T
    expected, terms = x.double() @ W.double().T, x.double().abs() @ W.double().abs().T
    with torch.backends.mkldnn.flags(enabled=enabled):
        pairs = (
            (x, W),
            (x.T.contiguous().T, W),
            (x, W.T.contiguous().T),
            (wide[:, :d], W),
            (x, with_gaps),
            (x, of_columns),
        )
        for left, right in pairs:
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


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_the_library_is_given_no_matrix_with_gaps(columns: bool):
    """As keys and values are that lie beside the other heads': a hundred times as long."""

    class Seen(TorchDispatchMode):
        strides: tuple[int, ...] = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "_linear_pointwise" in str(function):
                self.strides = args[1].stride()
            return function(*args, **(kwargs or {}))

    whole = torch.randn(40, 3, 16, generator=torch.Generator().manual_seed(0))
    W = whole[:, 1].T if columns else whole[:, 1]
    with Seen() as seen:
        product(torch.ones(5, W.shape[1]), W)
    if not seen.strides:
        pytest.skip("this processor takes torch's own product")
    assert seen.strides == (W.shape[1], 1)
