"""attention_rows and attention_column_sums_ against their dense references in fp64."""

from collections.abc import Callable

import pytest
import torch
from sparsefeat_kernels import attention_column_sums_, attention_rows, implementation
from sparsefeat_kernels.attention.columns import reference as reference_column_sums
from sparsefeat_kernels.attention.rows import reference
from torch import Tensor

# batch, heads, key heads, n, t, d
SHAPES = {
    "odd": (2, 3, 3, 19, 37, 3),
    "grouped": (1, 4, 2, 5, 70, 40),
    "wide": (1, 2, 1, 17, 33, 72),
    "one_wide_head": (1, 1, 1, 3, 5, 300),
    "one": (1, 1, 1, 1, 1, 1),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 3e-6}


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, and marked keys [t]."""
    batch, heads, key_heads, n, t, d = shape
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, n, heads, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    key = torch.randn(batch, t, key_heads, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    return query.to(device), key.to(device), (torch.rand(t, generator=g) > 0.5).to(device)


def expected(query, key, scale=None, mask=None, marked=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference(query.double(), key.double(), scale, mask, marked)


def expected_sums(sums, query, key, lse, scale=None, mask=None, head_weight=None, group=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = torch.arange(query.shape[0]) if group is None else group
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference_column_sums(*(t.double() for t in (sums, query, key, lse)), scale, mask, head_weight, group)


def compare(query: Tensor, key: Tensor, tolerance: float = 3e-6, **options) -> tuple[Tensor, Tensor, Tensor]:
    got = attention_rows(query, key, **options)
    for ours, theirs in zip(got, expected(query, key, **options), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    return got


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_columns_add_up_as_in_the_whole_matrix(path: str, shape: tuple[int, ...], dtype: torch.dtype, request):
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    query, key, marked = problem(shape, dtype, path)
    tolerance = TOLERANCE[dtype]
    lse, _, _ = compare(query, key, tolerance, marked=marked)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    sums = torch.ones(shape[0], shape[4], dtype=lse.dtype, device=path)
    wanted = expected_sums(sums, query, key, expected(query, key)[0])
    attention_column_sums_(sums, query, key, lse)
    torch.testing.assert_close(sums.double(), wanted, rtol=5 * tolerance, atol=5 * tolerance)
    torch.testing.assert_close(sums.sum(1) - shape[4], torch.full_like(sums[:, 0], shape[1] * shape[3]))


def test_masks_marks_by_row_and_a_scale(path: str):
    query, key, _ = problem((2, 2, 1, 19, 70, 5), torch.float32, path)
    g = torch.Generator().manual_seed(1)
    kept = torch.rand(2, 70, generator=g).to(path) > 0.3
    kept[:, :64] &= torch.arange(64, device=path) > 60  # the first block of keys has few, or none
    kept[1, :64] = False
    bias = torch.randn(2, 1, 19, 70, generator=g).to(path)
    marked = torch.rand(2, 70, generator=g).to(path) > 0.5
    weight = torch.tensor([0.5, -2.0], device=path)
    group = torch.tensor([1, 1], device=path)
    key = key.contiguous()
    for mask in (kept, bias, bias.masked_fill(~kept[:, None, None], -torch.inf)):
        lse, _, _ = compare(query, key, scale=0.9, mask=mask, marked=marked)
        sums = torch.ones(2, 70, device=path)
        wanted = expected_sums(sums, query, key, lse, 0.9, mask, weight, group)
        attention_column_sums_(sums, query, key, lse, 0.9, mask, weight, group)
        torch.testing.assert_close(sums.double(), wanted, rtol=1e-5, atol=1e-5)
    key[:, :, 0] = torch.nan
    lse, entropy, mass = attention_rows(query, key, mask=kept, marked=marked)
    assert lse.isfinite().all()
    assert entropy.isfinite().all()
    assert mass.isfinite().all()
    sums = torch.zeros(2, 70, device=path)
    attention_column_sums_(sums, query, key, lse, mask=kept)
    assert sums.isfinite().all()
    assert (sums[~kept] == 0).all()


def test_uniform_rows_and_rows_on_one_key(path: str):
    query, key, marked = problem((1, 1, 1, 18, 50, 4), torch.float32, path)
    lse, entropy, mass = attention_rows(query * 0, key, marked=marked)
    log = torch.full_like(lse, 50.0).log()
    torch.testing.assert_close(lse, log)
    torch.testing.assert_close(entropy, log)
    torch.testing.assert_close(mass, torch.full_like(mass, float(marked.sum()) / 50))
    one = torch.zeros(1, 50, dtype=torch.bool, device=path)
    one[:, 41] = True
    lse, entropy, mass = attention_rows(query, key, mask=one, marked=one)
    torch.testing.assert_close(lse, (query @ key[:, :, 41, :, None])[..., 0] / 2)
    assert (entropy == 0).all()
    assert (mass == 1).all()


def test_a_row_whose_keys_are_all_masked_is_empty(path: str):
    query, key, marked = problem((2, 2, 2, 3, 70, 4), torch.float32, path)
    kept = torch.arange(70, device=path) > torch.tensor([[64], [70]], device=path)  # all of the first block masked
    few = attention_rows(query[:1], key[:1, :, 65:], marked=marked[65:])
    lowest = torch.zeros(2, 70, device=path).masked_fill(~kept, torch.finfo(torch.float32).min)
    for mask in (kept, lowest, lowest.clamp(min=-1e29)):  # the last is no mask, but far below: nothing overflows
        rows = lse, entropy, mass = attention_rows(query, key, mask=mask, marked=marked)
        for all_keys, last_keys in zip(rows, few, strict=True):
            torch.testing.assert_close(all_keys[:1], last_keys, rtol=1e-5, atol=1e-5)
        if mask is not kept and mask.min() > -1e30:
            continue
        assert (lse[1] == -torch.inf).all()
        assert (entropy[1] == 0).all()
        assert (mass[1] == 0).all()
        sums = torch.zeros(2, 70, device=path)
        attention_column_sums_(sums, query, key, lse, mask=mask)
        assert (sums[1] == 0).all()


def test_large_scores_do_not_overflow(path: str):
    query, key, marked = problem((1, 2, 2, 17, 70, 4), torch.float32, path)
    lse, entropy, mass = attention_rows(query * 1e4, key * 1e4, marked=marked)
    wanted = expected(query * 1e4, key * 1e4, marked=marked)[0]
    torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=0)
    assert entropy.isfinite().all()
    assert mass.isfinite().all()


def test_a_broken_row_breaks_only_itself(path: str):
    query, key, marked = problem((1, 2, 2, 18, 40, 4), torch.float32, path)
    clean = attention_rows(query, key, marked=marked)
    query = query.clone()
    query[0, 1, 3, 2] = torch.nan
    assert not attention_rows(query, key)[2].any()  # no key is marked
    for broken, whole in zip(attention_rows(query, key, marked=marked), clean, strict=True):
        assert broken[0, 1, 3].isnan()
        broken[0, 1, 3] = whole[0, 1, 3]
        assert torch.equal(broken, whole)


def test_rows_past_the_last_give_nothing_whatever_a_key_holds(path: str):
    query, key, _ = problem((1, 2, 2, 19, 40, 1), torch.float32, path)  # no block of rows ends at 19
    query, key = query.abs() + 0.1, key.contiguous()
    kept = torch.arange(40, device=path) != 7
    bias = torch.zeros(1, 1, 19, 40, device=path).masked_fill(~kept, -torch.inf)
    for held, mask in ((torch.nan, bias), (-torch.inf, None)):  # masked pair by pair, or of score -inf in every row
        key[:, :, 7] = held
        sums, without = torch.zeros(1, 40, device=path), torch.zeros(1, 39, device=path)
        lse = attention_rows(query, key, mask=mask)[0]
        attention_column_sums_(sums, query, key, lse, mask=mask)
        attention_column_sums_(without, query, key[:, :, kept], lse)
        assert sums[0, 7] == 0
        torch.testing.assert_close(sums[:, kept], without, rtol=1e-6, atol=1e-6)


def test_groups_that_do_not_count(path: str):
    query, key, _ = problem((4, 2, 2, 17, 20, 4), torch.float32, path)
    lse = attention_rows(query, key)[0]
    sums = torch.randn(2, 20, generator=torch.Generator().manual_seed(3)).to(path)
    group = torch.tensor([1, -1, 1, 2], dtype=torch.int32, device=path)  # 2: there is no such group
    result = sums.clone()
    attention_column_sums_(result, query, key, lse, group=group)
    wanted = expected_sums(sums, query, key, lse, group=group)
    torch.testing.assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(result[0], sums[0])
    strided = sums.T.contiguous().T
    attention_column_sums_(strided, query, key, lse.mT.contiguous().mT, group=group)
    assert torch.equal(strided, result)


def test_the_same_bits_every_run(path: str):
    query, key, marked = problem((1, 2, 1, 35, 70, 6), torch.float32, path)
    first = attention_rows(query, key, marked=marked)
    for _ in range(2):
        for again, before in zip(attention_rows(query, key, marked=marked), first, strict=True):
            assert torch.equal(again, before)
    results = [torch.zeros(1, 70, device=path) for _ in range(3)]
    for sums in results:
        attention_column_sums_(sums, query, key, first[0])
        assert torch.equal(sums, results[0])


def test_no_rows_and_no_keys(path: str):
    query, key, marked = problem((2, 2, 2, 5, 3, 4), torch.float32, path)
    assert [t.shape for t in attention_rows(query[:, :, :0], key, marked=marked)] == [(2, 2, 0)] * 3
    lse, entropy, mass = attention_rows(query, key[:, :, :0])
    assert (lse == -torch.inf).all()
    assert (entropy == 0).all()
    assert (mass == 0).all()
    attention_column_sums_(torch.zeros(2, 0, device=path), query, key[:, :, :0], lse)
    assert not attention_rows(query, key)[2].any()  # no key is marked


MISTAKES: dict[str, Callable[..., dict]] = {
    "query must be": lambda q, k: {"query": q[0]},
    "key must be": lambda q, k: {"key": k[..., :2]},
    "marked must be bool": lambda q, k: {"marked": torch.ones(3)},
    "marked must be .t. or .batch, t.": lambda q, k: {"marked": torch.ones(4, dtype=torch.bool)},
    "mask must be bool": lambda q, k: {"mask": torch.ones(2, 3, dtype=torch.int32)},
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    query, key, _ = problem((2, 2, 2, 5, 3, 4), torch.float32, "cpu")
    with pytest.raises((ValueError, TypeError), match=named):
        attention_rows(**({"query": query, "key": key} | MISTAKES[named](query, key)))


def test_more_batch_rows_than_a_grid_has_are_refused_and_more_groups_are_not(path: str):
    query = torch.ones(1, 1, 1, 1, device=path)
    sums = torch.zeros(65_540, 1, device=path)
    if path == "cuda":
        attention_column_sums_(
            sums, query, query, torch.zeros(1, 1, 1, device=path), group=torch.tensor([65_537]).to(path)
        )
        assert sums.nonzero().tolist() == [[65_537, 0]]
    if implementation("attention_rows", query) == "triton":
        many = query.expand(65_536, 1, 1, 1)
        with pytest.raises(ValueError, match="query must have at most 65535 batch rows"):
            attention_rows(many, many)


def test_sums_that_do_not_fit_are_refused():
    query, key, _ = problem((2, 2, 2, 5, 3, 4), torch.float32, "cpu")
    lse = attention_rows(query, key)[0]
    with pytest.raises(ValueError, match=r"sums must be \[groups, 3\]"):
        attention_column_sums_(torch.zeros(2, 4), query, key, lse)
    with pytest.raises(ValueError, match="lse must be"):
        attention_column_sums_(torch.zeros(2, 3), query, key, lse[..., :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_keys_are_not_copied(one_thread, dtype: torch.dtype):
    query, key, marked = problem((1, 16, 16, 64, 8192, 64), dtype, "cpu")  # 32 MiB of keys in float32
    with torch.profiler.profile(profile_memory=True) as profile:
        lse = attention_rows(query, key, marked=marked)[0]
        attention_column_sums_(torch.zeros(1, 8192), query, key, lse)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 3 << 20
