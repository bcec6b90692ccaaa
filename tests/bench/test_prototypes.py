"""Kernels that are timed beside the package's: that they compute the same, as far as a prototype promises."""

import importlib.util

import pytest
import torch
from sparsefeat_kernels import force_triton, topk_encode
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE

from bench import prototypes

pytestmark = pytest.mark.skipif(
    not TRITON_AVAILABLE or importlib.util.find_spec("triton.tools.tensor_descriptor") is None,
    reason="Triton is not installed, or has no tensor descriptors",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("tile", [prototypes.LARGE, prototypes.SMALL], ids=lambda tile: str(tile.BLOCK_LATENTS))
@pytest.mark.parametrize(("rows", "d", "n", "k"), [(5, 64, 1000, 4), (131, 32, 700, 3)])
def test_proved_rows_are_the_exact_code(tile, rows, d, n, k):
    g = torch.Generator().manual_seed(rows)
    x, W, bias = (torch.randn(size, generator=g).to(DEVICE) for size in ((rows, d), (n, d), (n,)))
    W[17] = W[400]  # a tie: the lower index
    bias[17] = bias[400]
    values, indices, proved = prototypes.candidates_encode(x, W, bias, k, tile)
    wanted = topk_encode(x.double(), W.double(), bias.double(), torch.zeros(d, device=DEVICE).double(), k)
    assert proved.float().mean() > 0.95
    assert torch.equal(indices[proved], wanted[1][proved])
    torch.testing.assert_close(values[proved].double(), wanted[0][proved], rtol=2**-19, atol=1e-4)


def test_a_row_with_four_of_its_largest_in_one_group_is_not_proved():
    """A group of 16 keeps three: latents 0, 1, 8 and 9 are of one."""
    x, W = torch.ones(1, 16, device=DEVICE), torch.zeros(512, 16, device=DEVICE)
    W[[0, 1, 8, 9], 0] = torch.tensor([4.0, 3.0, 2.0, 1.0], device=DEVICE)
    proved = prototypes.candidates_encode(x, W, torch.zeros(512, device=DEVICE), 4, prototypes.SMALL)[2]
    assert proved.tolist() == [False]
    apart = torch.zeros_like(W)
    apart[[0, 64, 128, 192], 0] = W[[0, 1, 8, 9], 0]
    values, indices, proved = prototypes.candidates_encode(
        x, apart, torch.zeros(512, device=DEVICE), 4, prototypes.SMALL
    )
    assert proved.tolist() == [True]
    assert indices.tolist() == [[0, 64, 128, 192]]
    torch.testing.assert_close(values, torch.tensor([[4.0, 3.0, 2.0, 1.0]], device=DEVICE), rtol=2**-19, atol=0)


def test_a_product_in_parts_is_the_product():
    g = torch.Generator().manual_seed(0)
    x, W, bias = (torch.randn(size, generator=g).to(DEVICE) for size in ((70, 90), (150, 90), (150,)))
    precision = "bf16x6" if DEVICE == "cuda" else "ieee"  # the interpreter knows no other
    with force_triton():
        out = prototypes.product_in_parts(x, W, bias, precision)
    torch.testing.assert_close(out.double(), x.double() @ W.double().T + bias.double(), rtol=1e-5, atol=1e-4)


def test_more_entries_than_maxima_are_refused():
    x, W = torch.zeros(1, 16), torch.zeros(128, 16)
    with pytest.raises(ValueError, match="k must be at most 8 for 128 latents, got 9"):
        prototypes.candidates_encode(x, W, torch.zeros(128), 9, prototypes.SMALL)
