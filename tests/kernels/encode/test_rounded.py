"""The bound that the prefilters of a CPU stand on, attacked term by term, and the exact products of what survives."""

import pytest
import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels.encode import rounded as rounded_encoder
from sparsefeat_kernels.encode.rounded import RoundedEncoder, RoundedRows, round_encoder, rounded_width
from sparsefeat_kernels.threads import together
from torch import Tensor

pytestmark = pytest.mark.skipif(not kernels.bf16_products(), reason="this processor has no bf16 matrix instructions")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROWS, D, N = 24, 64, 96


def rounded(encoder: RoundedEncoder, x: Tensor, b_pre: Tensor) -> RoundedRows:
    rows = encoder.room_for(len(x))
    together(encoder.rounding(x, b_pre, rows))
    return rows


def product(encoder: RoundedEncoder, rows: RoundedRows) -> Tensor:
    out = torch.full((len(rows.low), len(encoder.W_enc)), torch.nan, dtype=torch.bfloat16)
    together(encoder.product(rows, out))
    return out


def share_of_bound(x: Tensor, W: Tensor, b: Tensor, b_pre: Tensor, rows: int = 1 << 20) -> Tensor:
    """The error of every product against fp64, as a share of what the bound allows."""
    encoder = round_encoder(W, b, rows)
    part = rounded(encoder, x, b_pre)
    p = product(encoder, part).double()
    bounds = encoder.bounds.double()
    bound = part.lost[:, None] * bounds[0] + part.size[:, None] * bounds[1] + bounds[2] + p.abs() * 2.0**-8
    exact = (x.float() - b_pre.float()).double() @ W.double().T + b.double()
    assert part.provable.all()
    return (p - exact).abs() / bound


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("d", [1, 67, 1280])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e17])
def test_norms_are_never_less_than_the_true_ones(dtype: str, d: int, scale: float):
    """Of equal numbers too, whose sum bf16 could not hold beyond 256 of them."""
    x = torch.randn(40, d, generator=torch.Generator().manual_seed(5)) * scale
    x[::2] = scale
    x = x.to(DTYPES[dtype])
    true, found = x.double().norm(dim=1), rounded_encoder.norm_rounded_up(x).double()
    assert (found >= true).all()
    assert (found <= true * (1 + 2.0**-7) + 2.0**-62 * d**0.5).all()


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(4)) * 2.0 - 1


def worst(term: str) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b for which one term of the bound is nearly all of the error there is; b takes the stored value to 0."""
    g = torch.Generator().manual_seed(3)
    x, W, b = torch.zeros(ROWS, D), torch.zeros(N, D), torch.zeros(N)
    if term == "rounded x":  # weights along what x loses
        x[:] = torch.randn(D, generator=g)
        lost = x[0] - x[0].bfloat16().float()
        W[:] = (lost / lost.norm()).bfloat16().float()
        b[:] = -(x[0].bfloat16().float() @ W[0]).bfloat16().float()
    elif term == "rounded weights":  # just below half of a last place, all in x's direction
        s = signs(N, D)
        W, x = s * (1 + 2.0**-8 - 2.0**-10), s[:ROWS].clone()
        b[:] = -D
    elif term == "stored":  # the same for the result
        b[:] = 1 + 2.0**-8 - 2.0**-14
    elif term == "accumulation":  # what is added to 1 is below half of its last place in fp32
        x[:, 0], W[:, 0], b[:] = 1, 1, -1
        x[:, 1:], W[:, 1:] = 2.0**-12, 2.0**-13
    elif term == "denormal products":
        x[:], W[:] = 2.0**-70, 2.0**-60
    elif term == "denormal x":
        x[:], W[:] = 2.0**-130, 2.0**10
    elif term == "denormal weights":
        x[:], W[:] = 2.0**10, 2.0**-130
    return x, W, b


@pytest.mark.parametrize(
    ("term", "least"),
    [
        ("rounded x", 0.9),
        ("rounded weights", 0.9),
        ("stored", 0.98),
        ("accumulation", 0.02),
        ("denormal products", 1e-3),
        ("denormal x", 0),
        ("denormal weights", 0),
    ],
)
def test_each_term_of_the_bound_is_needed_and_holds(term: str, least: float):
    """`least` of the bound is really reached: a smaller term would be seen here. (Denormal inputs are lost among what
    their squares may have lost in the norms.)"""
    share = share_of_bound(*worst(term), torch.zeros(D))
    assert share.max() <= 1
    assert share.max() >= least


def test_weights_that_are_not_measured_are_bounded_by_half_a_last_place():
    x, W, b = worst("rounded weights")
    share = share_of_bound(x, W, b, torch.zeros(D), rows=1)
    assert 0.7 <= share.max() <= 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e-15, 1e-25])
def test_no_product_is_further_from_the_reference_than_the_bound_says(dtype: torch.dtype, scale: float, monkeypatch):
    monkeypatch.setattr(rounded_encoder, "ROUNDED_TILE_BYTES", 1 << 14)  # several tiles of both kinds
    monkeypatch.setattr(rounded_encoder, "WIDENED_TILE_BYTES", 1 << 13)
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        b_pre = 30 * torch.randn(D, generator=g)
        x = b_pre + torch.randn(ROWS, D, generator=g) * scale
        W = torch.randn(N, D, generator=g) * torch.logspace(-4, 4, N)[:, None] * scale**0.5
        b = torch.randn(N, generator=g) * scale
        inputs = [t.to(dtype) for t in (x, W, b, b_pre)]
        for rows in (1, 1 << 20):
            share = share_of_bound(*inputs, rows=rows)
            assert share.max() <= 1
        if scale == 1:
            assert share.max() > 0.05  # it is a bound on this, not on something else


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, 3e38])
def test_what_may_overflow_is_not_provable(broken: float):
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(s, generator=g) for s in ((4, D), (N, D), (N,)))
    origin = torch.zeros(D)
    assert rounded(round_encoder(W, b, 4), x, origin).provable.all()
    x[1, 2] = broken
    assert rounded(round_encoder(W, b, 4), x, origin).provable.tolist() == [True, False, True, True]
    W[5, 1] = broken
    assert not rounded(round_encoder(W, b, 4), x, origin).provable.any()
    W[5, 1], b[7] = 0, broken
    assert not rounded(round_encoder(W, b, 4), x, origin).provable.any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_exact_products_are_those_of_the_pairs_asked_for(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr(rounded_encoder, "WIDENED_TILE_BYTES", 1 << 12)
    g = torch.Generator().manual_seed(1)
    centred, W = torch.randn(ROWS, D, generator=g), torch.randn(N, D, generator=g).to(dtype)
    encoder = round_encoder(W, torch.zeros(N), ROWS)
    row, latent = torch.randint(0, ROWS, (500,), generator=g), torch.randint(0, N, (500,), generator=g)
    expected = (centred.double() @ W.double().T)[row, latent]
    for count in (500, 0):
        out = torch.empty(count)
        together(encoder.rescoring(centred, row[:count], latent[:count], out))
        torch.testing.assert_close(out.double(), expected[:count], atol=1e-5, rtol=0)


def test_weights_kept_and_weights_rounded_again_give_the_same_products(monkeypatch):
    monkeypatch.setattr(rounded_encoder, "ROUNDED_TILE_BYTES", 1 << 13)
    g = torch.Generator().manual_seed(2)
    x, W, b = (torch.randn(s, generator=g) for s in ((ROWS, D), (N, D), (N,)))
    kept, again = round_encoder(W, b, 1, 2 * N * rounded_width(D)), round_encoder(W, b, 1)
    assert len(kept.low) == N
    assert again.low is None
    out = [product(e, rounded(e, x, torch.zeros(D))) for e in (kept, again)]
    assert torch.equal(*out)
