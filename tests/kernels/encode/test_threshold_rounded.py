"""threshold_encode and its CSR form on a CPU through a product in bf16: the contract on pre-activations that are hard for it."""

import pytest
import torch
from sparsefeat_kernels import (
    bf16_products,
    threshold_encode,
    threshold_encode_csr,
)
from sparsefeat_kernels.encode import rounded as rounded_encoder
from sparsefeat_kernels.encode import threshold_cpu
from torch import Tensor

NAN, INF = torch.nan, torch.inf
needs_bf16 = pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")


@pytest.fixture
def small_products(monkeypatch) -> None:
    """Every product is worth rounding weights for, in several tiles, chunks of 11 rows and blocks of fewer."""
    for name in ("ROUNDED_ROWS", "ROUNDED_WIDTH", "ROUNDED_PRODUCT"):
        monkeypatch.setattr(rounded_encoder, name, 1)
    monkeypatch.setattr(rounded_encoder, "ROUNDED_TILE_BYTES", 1 << 16)
    monkeypatch.setattr(rounded_encoder, "WIDENED_TILE_BYTES", 1 << 16)
    monkeypatch.setattr(threshold_cpu, "PREACTIVATION_BYTES", 36000)
    monkeypatch.setattr(threshold_cpu, "CANDIDATES", 4000)
    monkeypatch.setattr(threshold_cpu, "PAIRS", 300)
    monkeypatch.setattr(threshold_cpu, "PIECE_ENTRIES", 500)


def hard(name: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """x, W_enc, b_enc, b_pre and thresholds of a named difficulty; some 30 of 1,024 latents are active in a row."""
    g = torch.Generator().manual_seed(seed)
    rows, d, n = 23, 67, 1024
    x, W = torch.randn(rows, d, generator=g), torch.randn(n, d, generator=g) / d**0.5
    b, c = 0.1 * torch.randn(n, generator=g), torch.randn(d, generator=g)
    threshold = 3 + 0.2 * torch.randn(n, generator=g)
    if name == "one threshold":
        threshold = torch.tensor(2.9)
    elif name == "never active":
        threshold[::3], threshold[1::3] = INF, NAN
    elif name == "cancellation":  # large opposed terms: the sum is 1e-5 of them
        x = torch.cat([x * 1e3, -x * 1e3], 1) + 0.01 * torch.randn(rows, 2 * d, generator=g)
        W, c = torch.cat([W, W], 1), torch.zeros(2 * d)
        threshold *= 0.01
    elif name == "large mean":
        x, c = x + 300, c + 300
    elif name == "norms of all sizes":
        scale = torch.logspace(-6, 6, n)
        W, b, threshold = W * scale[:, None], b * scale, threshold * scale
    elif name == "tiny":
        x, W, b, c, threshold = x * 1e-20, W * 1e-17, b * 1e-37, c * 1e-20, threshold * 1e-37
    elif name == "large bias":
        b = b + 1e4
        threshold = threshold + 1e4
    elif name == "overflow":
        x[::3] *= 1e37
        W[::5] *= 1e4
    elif name == "not finite":
        x[3, 5], x[7, 0], x[11] = NAN, INF, -INF
    elif name == "dense rows":
        W[:] = W.abs()
        x[::4] = c + 5
    elif name == "dense":
        threshold -= 3
    x, W, b, c, threshold = (t.to(dtype) for t in (x, W, b, c, threshold))
    if name == "near the threshold":  # of every latent, that of one row is within bf16's rounding of it
        a = (x.double() - c.double()) @ W.double().T + b.double()
        a = a.sort(0, descending=True).values[0]
        threshold = (a * (1 + 1e-4 * torch.randn(n, generator=g))).float()
    return x, W, b, c, threshold


HARD = (
    "plain", "one threshold", "near the threshold", "never active", "cancellation", "large mean", "norms of all sizes",
    "tiny", "large bias", "overflow", "not finite", "dense rows", "dense",
)  # fmt: skip


def assert_is_what_the_reference_says(got: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """CSR: all that is surely above its threshold, nothing that is surely below, values within the rounding bound."""
    values, indices, row_offsets = got
    x, W, b, c, threshold = (t.double() for t in inputs)
    a = (x - c) @ W.T + b
    size = (x - c).abs() + (x.abs() + c.abs()) * 2.0**-23
    epsilon = (x.shape[1] + 8) * 2.0**-23 * (size @ W.abs().T + b.abs()) + 1e-44
    floor = threshold.float().double().clamp(min=0).expand(len(W))
    usable = a.isfinite().all(1) & ((a.abs() + epsilon).amax(1) < 3e38)
    row = torch.arange(len(x)).repeat_interleave(row_offsets.diff())
    found = torch.full_like(a, torch.nan)
    found[row, indices.long()] = values.double()
    assert len(values) == len(row) == found[~found.isnan()].numel() + values.isnan().sum()
    flat = row * len(W) + indices
    assert (flat[1:] > flat[:-1]).all(), "not in order of the index"
    active = ~found.isnan()
    assert active[usable][(a > floor + epsilon)[usable]].all(), "one is missing"
    assert not active[usable][~(a > floor - epsilon)[usable]].any(), "one too many"
    assert ((found - a).abs() <= epsilon)[active & usable[:, None]].all()


@needs_bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", HARD)
def test_the_contract_holds_through_a_bf16_product(name: str, dtype: torch.dtype, small_products, monkeypatch):
    plainly, plain = [], threshold_cpu._entries_plainly
    monkeypatch.setattr(threshold_cpu, "_entries_plainly", lambda *a: plainly.append(len(a[0])) or plain(*a))
    for seed in range(3):
        inputs = hard(name, dtype, seed)
        got = threshold_encode_csr(*inputs)
        widened = tuple(t.float() for t in inputs)
        assert_is_what_the_reference_says(got, widened)
        values, indices, counts = threshold_encode(*inputs, 1024)
        kept = torch.arange(1024)[None] < counts[:, None]
        torch.testing.assert_close(values[kept], got[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(indices[kept], got[1])
        assert torch.equal(counts.long(), got[2].diff())
        with monkeypatch.context() as patch:
            patch.setattr(threshold_cpu, "pays_to_round", lambda *_: False)
            wanted = threshold_encode(*inputs, 1024)
        broken = ~wanted[0].isfinite().all(1)
        torch.testing.assert_close(values[broken], wanted[0][broken], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(counts[broken], wanted[2][broken])
    if name in ("plain", "one threshold") or (name == "large bias" and dtype == torch.float32):
        assert plainly == 3 * [23]  # the comparison's own
    elif name in ("dense", "dense rows"):
        assert len(plainly) > 3


@needs_bf16
def test_few_latents_are_computed_in_fp32(small_products, monkeypatch):
    seen = []
    inner = rounded_encoder.RoundedEncoder.rescoring
    monkeypatch.setattr(rounded_encoder.RoundedEncoder, "rescoring", lambda *a: seen.append(len(a[2])) or inner(*a))
    inputs = hard("plain", torch.float32, 0)
    entries = len(threshold_encode_csr(*inputs)[0])
    assert 50 < entries <= sum(seen) < 3 * entries


@needs_bf16
def test_the_scratch_does_not_grow_with_rows_through_a_bf16_product(one_thread):
    """Of all that is held at a time."""
    g = torch.Generator().manual_seed(0)
    rows, d, n = 3000, 128, 8192  # 49 MB of products in bf16, 98 MB of fp32
    x, W, b = (torch.randn(s, generator=g) for s in ((rows, d), (n, d), (n,)))
    assert rounded_encoder.pays_to_round(x, W)
    with torch.profiler.profile(profile_memory=True) as profile:
        threshold_encode(x, W, b, torch.zeros(d), torch.tensor(30.0), 64)
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 20 << 20 < most < (64 << 20) + rows * 64 * 8
