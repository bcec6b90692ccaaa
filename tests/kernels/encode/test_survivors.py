"""The bf16 prefilter keeps topk_encode's contract: attacked where a bound could be wrong."""

import pytest
import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels import prepare_encoder, topk_encode
from sparsefeat_kernels.encode import rounded as rounded_encoder
from sparsefeat_kernels.encode import survivors
from sparsefeat_kernels.encode import topk as topk_module
from sparsefeat_kernels.encode.rounded import RoundedEncoder, RoundedRows
from sparsefeat_kernels.encode.topk import reference

pytestmark = pytest.mark.skipif(not kernels.bf16_products(), reason="this processor has no bf16 matrix instructions")

N = 1024


def case(name: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, W_enc, b_enc, b_pre of a named difficulty."""
    g = torch.Generator().manual_seed(seed)
    rows, d = 23, 67
    x, w = torch.randn(rows, d, generator=g), torch.randn(N, d, generator=g) / d**0.5
    b, c = 0.3 * torch.randn(N, generator=g), torch.randn(d, generator=g)
    if name == "near ties":  # every latent is the same up to fp32 rounding: bf16 cannot tell any apart
        w = w[:1] * (1 + torch.randn(N, 1, generator=g) * 3e-7)
        b = torch.zeros(N)
    elif name == "pairs within bf16":  # each latent has a twin that differs below bf16's precision
        w[N // 2 :] = w[: N // 2] * (1 + 1e-4 * torch.randn(N // 2, 1, generator=g))
        b[N // 2 :] = b[: N // 2]
    elif name == "norms of all sizes":
        w, x = w * torch.logspace(-6, 6, N)[:, None], x * torch.logspace(-8, 8, rows)[:, None]
    elif name == "tiny":
        x, w, b, c = x * 1e-25, w * 1e-17, b * 1e-42, c * 1e-25
    elif name == "denormal":
        x, w, b, c = x * 1e-20, w * 1e-20, b * 1e-40, c * 1e-20
    elif name == "cancellation":  # large opposed terms: the sum is 1e-5 of them
        x = torch.cat([x * 1e3, -x * 1e3], 1) + 0.01 * torch.randn(rows, 2 * d, generator=g)
        w, c = torch.cat([w, w], 1), torch.zeros(2 * d)
    elif name == "large mean":
        x = x + 300
    elif name == "bias decides":
        b = b * 1e4
    elif name == "overflow":
        x[::3] *= 1e37
        w[::5] *= 1e4
    elif name == "zeros":
        x[::2] = c
        b[:] = 0
    elif name == "not finite":
        x[3, 5], x[7, 0], x[11] = torch.nan, torch.inf, -torch.inf
    elif name == "dead latents":
        w[::2], b[::2] = 0, 0
    return x, w, b, c


CASES = (
    "plain", "near ties", "pairs within bf16", "norms of all sizes", "tiny", "denormal", "cancellation", "large mean",
    "bias decides", "overflow", "zeros", "not finite", "dead latents",
)  # fmt: skip


def check(x, w, b, c, k, selection, values, indices):
    """The contract: what is left out is at most epsilon above what is in, and values are within epsilon."""
    exact = (x.double() - c.double()) @ w.double().T + b.double()
    # Rounding of x - b_pre, the product in fp32, the bias.
    size = (x.double() - c.double()).abs() + x.double().abs() * 2.0**-23 + c.double().abs() * 2.0**-23
    epsilon = (x.shape[1] + 8) * 2.0**-23 * (size @ w.double().abs().T + b.double().abs()) + 1e-37
    epsilon = epsilon.amax(1, keepdim=True)
    usable = exact.isfinite().all(1) & (exact.abs().amax(1) + epsilon[:, 0] < 3e38)
    score = exact.abs() if selection == "signed" else exact
    chosen = torch.zeros_like(exact, dtype=torch.bool).scatter_(1, indices.long(), True)
    assert (chosen.sum(1) == k)[usable].all(), "an index twice"
    worst_in = score.masked_fill(~chosen, torch.inf).amin(1)
    best_out = score.masked_fill(chosen, -torch.inf).amax(1)
    assert (best_out <= worst_in + 2 * epsilon[:, 0])[usable].all()
    expected = exact.gather(1, indices.long())
    expected = expected.clamp(min=0) if selection == "relu" else expected
    assert ((values.double() - expected).abs() <= epsilon)[usable].all()
    order = values.abs() if selection == "signed" else values
    assert (order[:, :-1] >= order[:, 1:])[usable].all()
    tied = (order[:, :-1] == order[:, 1:])[usable]
    assert (indices[:, :-1] < indices[:, 1:])[usable][tied].all()


@pytest.mark.parametrize("selection", ["relu", "raw", "signed"])
@pytest.mark.parametrize("name", CASES)
def test_the_contract_holds_where_bf16_is_worst(name, selection):
    for seed in range(3):
        x, w, b, c = case(name, seed)
        values, indices = topk_encode(x, w, b, c, 5, selection, prepared=prepare_encoder(w, b))
        check(x, w, b, c, 5, selection, values, indices)
        plain = topk_encode(x, w, b, c, 5, selection)
        broken = ~plain[0].isfinite().all(1)
        assert torch.equal(values[broken].nan_to_num(7.0), plain[0][broken].nan_to_num(7.0))
        assert torch.equal(indices[broken], plain[1][broken])


def test_weights_that_are_infinite_in_bf16_take_the_plain_path():
    x, w, b, c = case("plain")
    x[:, 3:5] = 0  # times infinity is no number in bf16; in fp32 nothing, in whatever order the sums are made
    clean = w.clone()
    w[7, 3], w[7, 4], c = 3.4e38, -3.4e38, torch.zeros_like(c)
    clean[7, 3:5] = 0
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    check(x, clean, b, c, 5, "relu", values, indices)


def test_a_weight_that_is_infinite_in_bf16_takes_the_plain_path_where_its_norm_is_finite():
    x, w = torch.full((4, 1), 1e-3), torch.linspace(0, 1e38, N)[:, None].clone()  # d is 1: the norm is |w|
    w[7] = 3.4e38
    b, c = torch.zeros(N), torch.zeros(1)
    b[100:110] = torch.arange(10) * 1e35 + 1e36
    for k in (1, 2):
        values, indices = topk_encode(x, w, b, c, k, prepared=prepare_encoder(w, b))
        assert indices.tolist() == [[109, 108][:k]] * 4
        check(x, w, b, c, k, "relu", values, indices)


@pytest.fixture(autouse=True)
def small_calls_are_prefiltered(monkeypatch) -> None:
    monkeypatch.setattr(survivors, "PREFILTERED_PRODUCT", 1)


@pytest.fixture
def small_products(monkeypatch) -> None:
    """Every product is worth rounding weights for, in several tiles."""
    for name in ("ROUNDED_ROWS", "ROUNDED_WIDTH", "ROUNDED_PRODUCT"):
        monkeypatch.setattr(rounded_encoder, name, 1)
    monkeypatch.setattr(rounded_encoder, "ROUNDED_TILE_BYTES", 1 << 16)
    monkeypatch.setattr(rounded_encoder, "WIDENED_TILE_BYTES", 1 << 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_contract_holds_without_prepared_weights_in_any_precision(name, dtype, small_products, monkeypatch):
    plain, plainly = survivors.topk_encode_cpu, []
    monkeypatch.setattr(survivors, "topk_encode_cpu", lambda *a: plainly.append(len(a[0])) or plain(*a))
    for seed, selection in enumerate(("relu", "raw", "signed")):
        monkeypatch.setattr(rounded_encoder, "MEASURED_ROWS", 10**9 if seed else 0)
        x, w, b, c = (t.to(dtype) for t in case(name, seed))
        values, indices = topk_encode(x, w, b, c, 5, selection)
        assert values.dtype == torch.float32
        # Half-precision inputs are centred in fp32, and everything after is as of fp32.
        check(x.float(), w.float(), b.float(), c.float(), 5, selection, values, indices)
        again = topk_encode(x, w, b, c, 5, selection)
        assert torch.equal(values.nan_to_num(7.0), again[0].nan_to_num(7.0))
        assert torch.equal(indices, again[1])
        expected = plain(x, w, b, c, 5, selection)
        broken = ~expected[0].isfinite().all(1)
        assert torch.equal(values[broken].nan_to_num(7.0), expected[0][broken].nan_to_num(7.0))
        assert torch.equal(indices[broken], expected[1][broken])
    if name == "plain":
        assert not plainly
    elif name == "near ties" and dtype == torch.float32:
        assert plainly == 6 * [23]


def test_few_rows_small_products_and_other_dtypes_take_the_plain_path():
    def pays(rows: int, d: int, n: int, dtype: torch.dtype = torch.float32) -> bool:
        return rounded_encoder.pays_to_round(torch.empty(rows, d, dtype=dtype), torch.empty(n, d, dtype=dtype))

    assert pays(16, 1280, 8192)
    assert pays(16, 1280, 8192, torch.bfloat16)
    assert not pays(15, 1280, 8192)
    assert not pays(64, 640, 2048)
    assert not pays(2048, 64, 2048)
    assert not pays(16, 1280, 8192, torch.float64)


def test_gradients_of_half_precision_are_those_of_the_plain_op(small_products, monkeypatch):
    inputs = [t.bfloat16() for t in case("plain")]
    results = []
    for pays in (True, False):
        monkeypatch.setattr(topk_module, "pays_to_round", lambda *_, pays=pays: pays)
        got = [t.clone().requires_grad_() for t in inputs]
        values, _ = topk_encode(*got, 5)
        results.append(torch.autograd.grad((values * torch.arange(5)).sum(), got))
    for prefiltered, plain in zip(*results, strict=True):
        assert prefiltered.dtype == torch.bfloat16
        torch.testing.assert_close(prefiltered, plain, rtol=1 / 128, atol=1e-6)  # one unit in the last place


def test_after_a_chunk_that_could_not_be_proved_the_rest_goes_plainly(small_products, monkeypatch):
    """Rows like these would pay for two products each."""
    monkeypatch.setattr(survivors, "PREACTIVATION_BYTES", 1 << 14)  # seven rows a chunk
    products = []
    inner = RoundedEncoder.product
    monkeypatch.setattr(RoundedEncoder, "product", lambda *a: products.append(len(a[1].low)) or inner(*a))
    x, w, b, c = case("near ties")
    values, indices = topk_encode(x, w, b, c, 5)
    check(x, w, b, c, 5, "relu", values, indices)
    assert len(products) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_scratch_does_not_grow_with_rows(one_thread, dtype):
    """Of all that is held at a time, not of the largest piece alone."""
    g = torch.Generator().manual_seed(0)
    rows, d, n = 3000, 128, 8192  # 49 MB of products in bf16, 98 MB of fp32
    x, w, b = (torch.randn(s, generator=g).to(dtype) for s in ((rows, d), (n, d), (n,)))
    assert rounded_encoder.pays_to_round(x, w)
    with torch.profiler.profile(profile_memory=True) as profile:
        topk_encode(x, w, b, torch.zeros(d, dtype=dtype), 16)
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 20 << 20 < most < 64 << 20


@pytest.mark.parametrize("name", ["plain", "norms of all sizes", "tiny", "denormal", "cancellation", "large mean"])
def test_no_product_is_further_from_the_reference_than_the_bound_says(name):
    """The bound itself, entry by entry: a survivor lost to a wrong bound would be rare in the outputs."""
    for seed in range(3):
        x, w, b, c = case(name, seed)
        prepared = prepare_encoder(w, b)
        centred = x - c
        assert prepared.rounded is not None
        d, (low, bounds) = x.shape[1], prepared.rounded
        rounded = torch.zeros(len(x), low.shape[1], dtype=torch.bfloat16)
        rounded[:, :d], rounded[:, d : d + 3] = centred, 1
        p = (rounded @ low.T).double()
        kept = rounded[:, :d].double()
        size, lost = kept.norm(dim=1, keepdim=True), (centred.double() - kept).norm(dim=1, keepdim=True)
        bound = lost * bounds[0] + size * bounds[1] + bounds[2] + p.abs() * 2.0**-8
        error = (p - (centred.double() @ w.double().T + b.double())).abs()
        assert (error <= bound).all()
        if name not in ("tiny", "denormal"):  # there the allowance for flushed denormals is nearly all of it
            assert (error > bound / 1000).any()  # it is a bound on this, not on something else


def test_the_search_is_narrow_on_ordinary_rows(monkeypatch):
    """Otherwise all of this would be for nothing: rows are proved, and few latents are computed in fp32."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(40, 256, generator=g), torch.randn(4096, 256, generator=g) / 16
    b, c = torch.zeros(4096), torch.zeros(256)
    seen = []

    def spy(encoder, centred, row, latent, out, inner=RoundedEncoder.rescoring):
        seen.append(len(row))
        return inner(encoder, centred, row, latent, out)

    def never(*_):
        raise AssertionError("a row was not proved")

    monkeypatch.setattr(RoundedEncoder, "rescoring", spy)
    monkeypatch.setattr(survivors, "topk_encode_cpu", never)
    topk_encode(x, w, b, c, 8, prepared=prepare_encoder(w, b))
    assert 40 * 8 <= sum(seen) < 40 * 60


def test_rows_that_cannot_be_proved_take_the_plain_path(monkeypatch):
    x, w, b, c = case("near ties")
    plain, calls = survivors.topk_encode_cpu, []
    monkeypatch.setattr(survivors, "topk_encode_cpu", lambda *a: calls.append(len(a[0])) or plain(*a))
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    assert calls == [len(x)]
    assert all(torch.equal(a, e) for a, e in zip((values, indices), topk_encode(x, w, b, c, 5), strict=True))


@pytest.mark.parametrize("rows", [0, 1, 700])
def test_any_number_of_rows_gives_each_row_its_own_answer(rows, monkeypatch):
    monkeypatch.setattr(survivors, "PREACTIVATION_BYTES", 1 << 20)  # several chunks
    monkeypatch.setattr(survivors, "CANDIDATES", 1 << 14)  # several blocks in each
    g = torch.Generator().manual_seed(1)
    x, (_, w, b, c) = torch.randn(rows, 67, generator=g), case("plain")
    prepared = prepare_encoder(w, b)
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepared)
    check(x, w, b, c, 5, "relu", values, indices)
    again = topk_encode(x, w, b, c, 5, prepared=prepared)
    assert torch.equal(values, again[0])
    assert torch.equal(indices, again[1])


def test_strided_rows_odd_dictionaries_and_large_k_are_answered_too():
    x, w, b, c = case("plain")
    wide = torch.stack([x, x], 1)[:, 0]
    assert torch.equal(
        topk_encode(wide, w, b, c, 5, prepared=prepare_encoder(w, b))[1],
        topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))[1],
    )
    for n, k in ((1021, 5), (1024, 900)):
        small = w[:n].clone(), b[:n].clone()
        values, _ = topk_encode(x, *small, c, k, prepared=prepare_encoder(*small))
        expected = reference(x.double(), small[0].double(), small[1].double(), c.double(), k)
        torch.testing.assert_close(values, expected[0].float(), atol=1e-4, rtol=1e-4)


def test_gradients_are_those_of_the_plain_op():
    x, w, b, c = (t.requires_grad_() for t in case("plain"))
    prepared = prepare_encoder(w, b)
    results = []
    for options in ({}, {"prepared": prepared}):
        values, indices = topk_encode(x, w, b, c, 5, **options)
        results.append(torch.autograd.grad((values * torch.arange(5)).sum(), (x, w, b, c)))
        assert not indices.requires_grad
    for plain, prefiltered in zip(*results, strict=True):
        torch.testing.assert_close(prefiltered, plain)


def test_changed_weights_are_noticed():
    x, w, b, c = case("plain")
    prepared = prepare_encoder(w, b)
    topk_encode(x, w, b, c, 5, prepared=prepared)
    w[0] += 1
    with pytest.raises(ValueError, match="before they changed; prepare_encoder again"):
        topk_encode(x, w, b, c, 5, prepared=prepared)
    prepared = prepare_encoder(w, b)
    w.data = w.half()  # and back, as a module's .half().float() does: the first memory may be given out again
    w.data = w.float()
    with pytest.raises(ValueError, match="before they changed; prepare_encoder again"):
        topk_encode(x, w, b, c, 5, prepared=prepared)
    with pytest.raises(ValueError, match="made from other weights"):
        topk_encode(x, w.clone(), b, c, 5, prepared=prepare_encoder(w, b))
    with pytest.raises(TypeError, match=r"W_enc must be float32 to be prepared, got torch\.float16"):
        prepare_encoder(w.half(), b)
    low, bounds = torch.zeros(N, 128).bfloat16(), torch.zeros(3, N)  # of another width than 67 + 3, rounded up
    with pytest.raises(ValueError, match="prepared is for 1024 latents of width up to 125"):
        torch.ops.sparsefeat.topk_encode_prefiltered(x, w, b, c, low, bounds, 5, "relu")
    with pytest.raises(ValueError, match=r"pass W_enc \[n_latents, d\] and b_enc"):
        prepare_encoder(w, b[:5])


def test_without_bf16_instructions_the_plain_path_answers(monkeypatch):
    x, w, b, c = case("plain")
    monkeypatch.setattr(rounded_encoder, "bf16_products", lambda: False)
    values, indices = topk_encode(x, w, b, c, 5, prepared=prepare_encoder(w, b))
    plain = topk_encode(x, w, b, c, 5)
    assert torch.equal(values, plain[0])
    assert torch.equal(indices, plain[1])


@pytest.mark.parametrize(("rows", "prefiltered"), [(4, False), (10, True)])
def test_prepared_weights_are_passed_over_where_the_phases_cost_more_than_they_save(rows, prefiltered, monkeypatch):
    """The border lies at 6.8 rows of 768 x 3,072."""
    monkeypatch.setattr(survivors, "PREFILTERED_PRODUCT", 1 << 24)
    g = torch.Generator().manual_seed(3)
    x, w = torch.randn(rows, 768, generator=g), torch.randn(3072, 768, generator=g) / 28
    b, c = torch.zeros(3072), torch.zeros(768)
    products, inner = [], RoundedEncoder.product
    monkeypatch.setattr(RoundedEncoder, "product", lambda *a: products.append(1) or inner(*a))
    values, indices = topk_encode(x, w, b, c, 8, prepared=prepare_encoder(w, b))
    expected = reference(x.double(), w.double(), b.double(), c.double(), 8)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values.double(), expected[0], atol=1e-5, rtol=1e-5)
    assert bool(products) == prefiltered


@pytest.mark.parametrize(("k", "prefiltered"), [(32, True), (33, False)])
def test_a_large_share_of_the_latents_goes_the_plain_way(k, prefiltered, monkeypatch):
    """The border lies where there are eight groups of four for each of the k: at 32 of 1,024."""
    x, w, b, c = case("plain")
    products, inner = [], RoundedEncoder.product
    monkeypatch.setattr(survivors, "PREFILTERED_PRODUCT", 1)
    monkeypatch.setattr(RoundedEncoder, "product", lambda *a: products.append(1) or inner(*a))
    values, indices = topk_encode(x, w, b, c, k, prepared=prepare_encoder(w, b))
    expected = reference(x.double(), w.double(), b.double(), c.double(), k)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values.double(), expected[0], atol=1e-5, rtol=1e-5)
    assert bool(products) == prefiltered


@pytest.mark.parametrize(("offset", "negative"), [(0.0, False), (-30.0, True)])
@pytest.mark.parametrize("selection", ["raw", "relu"])
def test_on_both_sides_of_zero_rows_are_proved(selection: str, offset: float, negative: bool, monkeypatch):
    """Where the k largest are positive nobody looks for the largest of the groups that have no positive entry."""
    x, w, b, c = case("plain")
    b = b + offset
    exact, inner = [], survivors.group_maxima
    monkeypatch.setattr(survivors, "group_maxima", lambda p: exact.append(len(p)) or inner(p))
    monkeypatch.setattr(survivors, "topk_encode_cpu", None)  # for rows without a proof
    values, indices = topk_encode(x, w, b, c, 5, selection, prepared=prepare_encoder(w, b))
    check(x, w, b, c, 5, selection, values, indices)
    assert bool(exact) == negative


@pytest.mark.parametrize("offset", [0.7, 0.0, -1.0, -8.0, 8.0])
def test_the_maxima_of_groups_are_those_of_their_floats(offset: float):
    """Of integers with the floats' bits, where a group has a float that is not negative: no, few, many, all groups have none."""
    p = (torch.randn(29, 4, 51, generator=torch.Generator().manual_seed(3)) + offset).bfloat16()
    p[0, :, 0], p[1, :, 1], p[2, :, 2] = 0.0, -0.0, torch.tensor([-0.0, -1.0, 0.0, -torch.inf]).bfloat16()
    p[3, 1, 3], p[4, :, 4] = torch.inf, -torch.inf
    assert torch.equal(survivors.group_maxima(p).float() + 0.0, p.float().sort(1).values[:, -1] + 0.0)


@pytest.mark.parametrize("threshold", [-3.0, -0.01, 0.0, 0.7])
@pytest.mark.parametrize("signed", [False, True])
def test_an_entry_reaches_where_its_upper_bound_does(threshold: float, signed: bool):
    """On both sides of 0, where an error that grows with the entry's size moves the border to different sides."""
    g = torch.Generator().manual_seed(4)
    p = (3 * torch.randn(11, 4 * 9, generator=g)).bfloat16()
    p[:, ::5] = torch.linspace(threshold * 0.99, threshold * 1.01, 11).bfloat16()[:, None]
    p = p.abs() if signed else p
    size, lost, bounds = torch.rand(11, generator=g), torch.rand(11, generator=g), torch.rand(3, 9, generator=g) / 99
    row, of_group = (torch.rand(11, 9, generator=g) > 0.2).nonzero(as_tuple=True)
    rows = RoundedRows(p, p, size, lost, torch.ones(11, dtype=torch.bool))
    cut = survivors.cuts(torch.full((11,), threshold), rows, bounds)
    found = survivors.entries_that_reach(cut, p, row, of_group)
    a = p.double()
    margin = lost[:, None].double() * bounds[0] + size[:, None].double() * bounds[1] + bounds[2]
    over = a + a.abs() * 2.0**-8 + margin.repeat(1, 4) - threshold
    looked = torch.zeros(11, 9, dtype=torch.bool).index_put_((row, of_group), torch.tensor(True)).repeat(1, 4)
    reached = torch.zeros(11, 36, dtype=torch.bool).index_put_(found, torch.tensor(True))
    assert len(found[0]) == reached.sum() == len({*zip(*(t.tolist() for t in found), strict=True)})
    assert bool((reached >= (looked & (over >= 0))).all())
    assert bool((reached <= (looked & (over >= -1e-4))).all())
