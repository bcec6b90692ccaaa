"""The prefilter's GPU path keeps topk_encode's contract: attacked where its bound could be wrong, interpreted without a GPU."""

import json
import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sparsefeat_kernels import force_triton, prefilter_pays, prepare_encoder, topk_encode
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode.gpu import prefilter as prefilter_gpu
from sparsefeat_kernels.encode.gpu.prefilter import PrefilterSizes, gpu_weights
from sparsefeat_kernels.encode.topk import reference
from sparsefeat_kernels.tuning import table as tuning_table
from torch import Tensor

from tests.kernels.encode.test_survivors import CASES, case, check

pytestmark = [
    pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning"),  # numpy's, of interpreted kernels
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
SMALL_TILE = {"BLOCK_ROWS": 16, "BLOCK_LATENTS": 64, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if not ON_GPU:
        # The interpreter holds bfloat16 as integers and multiplies those: the same numbers, stored as float32.
        monkeypatch.setattr(prefilter_gpu, "LOW", torch.float32)
        monkeypatch.setattr(prefilter_gpu, "default_product", lambda dtype: SMALL_TILE)  # fewer empty rows to interpret
    with force_triton():
        yield


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """How many rows of each chunk were computed plainly, filled as the launcher runs."""
    counters: list[Tensor] = []
    select = prefilter_gpu.launch_select

    def watched(*args):
        counters.append(args[-1][1][0].clone())
        select(*args)

    monkeypatch.setattr(prefilter_gpu, "launch_select", watched)
    return counters


def rows_of(name: str, seed: int = 0) -> tuple[Tensor, ...]:
    """`case`, of which the rows that differ."""
    x, *weights = case(name, seed)
    chosen = {"not finite": [2, 3, 7, 11], "norms of all sizes": [0, 7, 15, 22]}.get(name, [0, 1, 2, 3])
    return tuple(t.to(DEVICE) for t in (x[chosen], *weights))


def on_cpu(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.cpu() for t in tensors)


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        *((name, "relu") for name in CASES),
        *((name, choice) for name in ("plain", "cancellation", "not finite") for choice in ("raw", "signed")),
    ],
)
def test_the_contract_holds_where_bf16_is_worst(name: str, selection: str):
    x, w, b, c = rows_of(name)
    values, indices = topk_encode(x, w, b, c, 5, selection, prepared=prepare_encoder(w, b))
    check(*on_cpu(x, w, b, c), 5, selection, *on_cpu(values, indices))
    broken = ~((x - c) @ w.T + b).isfinite().all(1)  # rows of nan, inf, overflow: the plain path's answer
    if bool(broken.any()):
        plain = topk_encode(x[broken], w, b, c, 5, selection)
        assert torch.equal(values[broken].nan_to_num(7.0), plain[0].nan_to_num(7.0))
        assert torch.equal(indices[broken], plain[1])


def matrix_unit(x: Tensor, w: Tensor) -> Tensor:
    """x w^T as matrix units add: 16 exact products at a time, aligned with the sum so far to the largest exponent among
    them, what is below its 24 bits cut off (Fasi, Higham, Mikaitis, Pranesh 2021; cutting every term is the worst case)."""
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for start in range(0, x.shape[1], 16):
        products = x[:, None, start : start + 16].double() * w[None, :, start : start + 16].double()
        terms = torch.cat([total[..., None], products], 2)
        unit = 2.0 ** (torch.frexp(terms.abs().amax(2, keepdim=True)).exponent.double() - 24)
        total = ((terms / unit).trunc() * unit).sum(2)
        unit = 2.0 ** (torch.frexp(total).exponent.double() - 24)
        total = (total / unit).trunc() * unit
    return total


@pytest.mark.parametrize("name", ["plain", "norms of all sizes", "cancellation", "large mean", "one sign", "aligned"])
def test_no_product_is_further_from_the_reference_than_the_bound_says(name: str):
    """The bound itself, entry by entry, with sums made as badly as matrix units make them."""
    if name == "one sign":  # every cut-off bit is lost in the same direction
        g = torch.Generator().manual_seed(0)
        x, w = torch.rand(4, 2048, generator=g) + 0.5, torch.rand(64, 2048, generator=g) + 0.5
        b, c = torch.zeros(64), torch.zeros(2048)
    elif name == "aligned":  # everything is rounded down by as much as can be: the bound is attained
        x, w = (torch.full((size, 67), 1 + 2.0**-8 - 2.0**-20) for size in (4, 64))
        b, c = torch.zeros(64), torch.zeros(67)
    else:
        x, w, b, c = case(name)
    low, bounds = gpu_weights(w, b)
    latent = torch.arange(len(w)).view(64, -1).T.reshape(-1)  # of every place of `low`
    centred = x - c
    kept = centred.bfloat16().double()
    size, lost = kept.norm(dim=1, keepdim=True), (centred.double() - kept).norm(dim=1, keepdim=True)
    p = (matrix_unit(kept, low.float()).float() + bounds[3]).double()
    bound = lost * bounds[0] + size * bounds[1] + bounds[2]
    error = (p - (centred.double() @ w.double().T + b.double())[:, latent]).abs()
    assert (error <= bound).all()
    assert (error > bound * (0.9 if name == "aligned" else 0.01)).any()  # it is a bound on this, not on something else


def test_the_allowance_for_matrix_units_covers_what_they_cut_off():
    g = torch.Generator().manual_seed(0)
    x, w = (torch.rand(size, 2048, generator=g).add(0.5).bfloat16().double() for size in (4, 64))
    cut = (matrix_unit(x, w) - x @ w.T).abs()
    allowed = prefilter_gpu.MATRIX_UNITS * (2048 + 8) * 2.0**-24 * x.norm(dim=1)[:, None] * w.norm(dim=1)
    assert (cut <= allowed).all()
    assert (cut > allowed / 50).any()


def test_ordinary_rows_are_proved_and_the_rest_takes_the_plain_path(listed: list[Tensor]):
    x, w, b, c = rows_of("plain")
    topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    x, w, b, c = rows_of("near ties")
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    x, w, b, c = rows_of("not finite")  # three of its rows
    topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    assert [int(count) for count in listed] == [0, 4, 3]
    check(*on_cpu(*rows_of("near ties")), 5, "relu", *on_cpu(values, indices))


def test_weights_that_are_infinite_in_bf16_take_the_plain_path():
    x, w, b, c = rows_of("plain")
    x[:, 3:5] = 0  # times infinity is no number in bf16; in fp32 nothing, in whatever order the sums are made
    clean = w.clone()
    w[7, 3], w[7, 4], c = 3.4e38, -3.4e38, torch.zeros_like(c)
    clean[7, 3:5] = 0
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    check(*on_cpu(x, clean, b, c), 5, "relu", *on_cpu(values, indices))


def test_a_weight_that_is_infinite_in_bf16_takes_the_plain_path_where_its_norm_is_finite():
    x, w = torch.full((2, 1), 1e-3), torch.linspace(0, 1e38, 1024)[:, None].clone()  # d is 1: the norm is |w|
    w[7] = 3.4e38
    b, c = torch.zeros(1024), torch.zeros(1)
    b[100:110] = torch.arange(10) * 1e35 + 1e36
    x, w, b, c = (t.to(DEVICE) for t in (x, w, b, c))
    values, indices = topk_encode(x, w, b, c, 2, prepared=prepare_encoder(w, b))
    assert indices.tolist() == [[109, 108]] * 2
    check(*on_cpu(x, w, b, c), 2, "relu", *on_cpu(values, indices))


@pytest.mark.skipif(ON_GPU or sys.platform != "linux", reason="needs memory that is addressed but not there")
def test_columns_may_lie_further_apart_than_32_bits_reach():
    apart = 2**30  # of W_enc [d, n_latents] as it is trained elsewhere, transposed: d n_latents beyond 2^31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    far = torch.frombuffer(mmap.mmap(-1, 4 * (2 * apart + 4096), flags=flags), dtype=torch.float32)
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 3, generator=g), torch.randn(1024, 3, generator=g)
    far_x, far_w = far[2048:].as_strided((2, 3), (1, apart)), far.as_strided((1024, 3), (1, apart))
    far_x.copy_(x), far_w.copy_(w)
    b, c = torch.zeros(1024), torch.zeros(3)
    values, indices = topk_encode(far_x, far_w, b, c, 2, prepared=prepare_encoder(far_w, b))
    check(x, w, b, c, 2, "relu", values, indices)


def test_equal_latents_tie_by_index_though_the_search_orders_them_otherwise():
    x, w, b, c = rows_of("plain")
    w, b = w[:128].repeat(8, 1), b[:128].repeat(8)  # latents i, i + 128, ... are one
    values, indices = topk_encode(x, w, b, c, 6, "raw", prepared=prepare_encoder(w, b))
    best = (x.double() - c.double()) @ w[:128].double().T + b[:128].double()
    best = best.argmax(1)
    assert torch.equal(indices.long(), best[:, None] + 128 * torch.arange(6, device=DEVICE))
    assert (values == values[:, :1]).all()


def test_any_number_of_rows_and_strides_in_several_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefilter_gpu, "TRITON_SCRATCH_BYTES", 16 * 5600)
    chunks = []
    rows_kernel = prefilter_gpu._prefilter_rows_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]):
            chunks.append(grid[0])
            return rows_kernel[grid]

    monkeypatch.setattr(prefilter_gpu, "_prefilter_rows_kernel", Watched())
    _, w, b, c = rows_of("plain")
    x = torch.randn(34, 67, 2, generator=torch.Generator().manual_seed(1)).to(DEVICE)[:, :, 0]
    wide = torch.stack([w, w], 2)[:, :, 1]
    prepared = prepare_encoder(wide, b)
    values, indices = topk_encode(x, wide, b, c, 5, prepared=prepared)
    assert sum(chunks) == 34
    assert len(chunks) > 1
    check(*on_cpu(x, w, b, c), 5, "relu", *on_cpu(values, indices))
    none = topk_encode(x[:0], wide, b, c, 5, prepared=prepared)
    assert none[0].shape == (0, 5)
    again = topk_encode(x[:17], wide, b, c, 5, prepared=prepared)
    assert torch.equal(again[0], values[:17])
    assert torch.equal(again[1], indices[:17])


@pytest.mark.parametrize(("n", "k"), [(1021, 5), (1024, 200)])
def test_odd_dictionaries_and_large_k_take_the_plain_path(n: int, k: int):
    x, w, b, c = rows_of("plain")
    w, b = w[:n].clone(), b[:n].clone()
    assert PrefilterSizes.of(n, k) is None
    values, _ = topk_encode(x, w, b, c, k, prepared=prepare_encoder(w, b))
    expected, _ = reference(x.double(), w.double(), b.double(), c.double(), k)
    torch.testing.assert_close(values, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(3072, 32), (5120, 10), (20480, 32), (32768, 64), (65536, 64), (524288, 64)])
def test_published_shapes_are_searched_in_groups_that_fit_one_program(n: int, k: int):
    sizes = PrefilterSizes.of(n, k)
    assert sizes is not None
    assert sizes.n_groups * sizes.group == n
    assert sizes.n_groups >= 8 * k
    assert sizes.most_groups * sizes.group <= 8192
    assert sizes.most_entries >= 2 * k
    assert math.log2(sizes.most_entries).is_integer()


def test_gradients_are_those_of_the_plain_op():
    x, w, b, c = (t.requires_grad_() for t in rows_of("plain"))
    prepared = prepare_encoder(w, b)
    assert prepared.low.shape == w.shape
    results = []
    for options in ({}, {"prepared": prepared}):
        values, _ = topk_encode(x, w, b, c, 5, **options)
        results.append(torch.autograd.grad((values * torch.arange(5, device=DEVICE)).sum(), (x, w, b, c)))
    for plain, prefiltered in zip(*results, strict=True):
        torch.testing.assert_close(prefiltered, plain, atol=1e-5, rtol=1e-5)


def test_it_is_used_by_itself_only_where_a_table_measured_it_to_be_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    w = torch.zeros(1024, 64, device=DEVICE)
    entry = {
        "rows": 256, "d": 64, "n_latents": 1024, "k": 5, "dtype": "float32", "design": "A", "blocks": SMALL_TILE,
    }  # fmt: skip
    answers = []
    for prefiltered_ms in (None, 0.2, 0.9):
        entries = [entry | {"op": "topk_encode", "median_ms": 0.5}]
        if prefiltered_ms is not None:
            entries.append(entry | {"op": "topk_encode_prefiltered", "median_ms": prefiltered_ms})
        table = {"device": "Made-up 1", "capability": [9, 0], "backend": "cuda", "date": "2026-01-02", "versions": {}}
        path = tmp_path / f"{prefiltered_ms}.json"
        path.write_text(json.dumps(table | {"entries": entries}))
        monkeypatch.setenv("SPARSEFEAT_TUNING", str(path))
        tuning_table._nearest.cache_clear()
        answers.append(prefilter_pays(w, 256, 5))
    tuning_table._nearest.cache_clear()
    assert answers == [False, True, False]
    assert not prefilter_pays(w.half(), 256, 5)
