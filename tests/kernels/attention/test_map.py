"""attention_map_ and attention_with_map_ against their dense reference in fp64."""

from collections.abc import Callable

import pytest
import torch
from sparsefeat_kernels import attention_map_, attention_rows, attention_with_map_, force_triton
from sparsefeat_kernels.attention import map as map_module
from sparsefeat_kernels.attention import map_cpu, scores
from sparsefeat_kernels.attention.map import reference
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# batch, heads, key heads, n, t, d, e
SHAPES = {
    "odd": (2, 3, 3, 19, 7, 3, 5),
    "grouped": (1, 4, 2, 5, 18, 40, 40),
    "wide": (1, 2, 1, 17, 9, 72, 72),
    "one": (1, 1, 1, 1, 1, 1, 1),
}
MASKS: dict[str, Callable[[int, int, int, int], tuple[int, ...]]] = {
    "keys": lambda b, h, n, t: (b, t),
    "sdpa": lambda b, h, n, t: (b, 1, 1, t),
    "heads": lambda b, h, n, t: (1, h, 1, t),
    "pairs": lambda b, h, n, t: (b, 1, n, t),
}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """maps (not zero), query, key, value; query laid out as an attention module does, heads side by side."""
    batch, heads, key_heads, n, t, d, e = shape
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).to(dtype).to(device)

    maps = torch.randn(batch, n, t, generator=g, dtype=torch.float64)
    maps = maps.to(torch.float64 if dtype == torch.float64 else torch.float32).to(device)
    return (
        maps,
        normal(batch, n, heads, d).transpose(1, 2),
        normal(batch, key_heads, t, d),
        normal(batch, key_heads, t, e),
    )


def expected(maps, query, key, value, scale=None, mask=None, head_weight=None, group=None, tokens=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = torch.arange(query.shape[0]) if group is None else group
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference(*(t.double() for t in (maps, query, key, value)), scale, mask, head_weight, group, tokens)


def both(maps: Tensor, query: Tensor, key: Tensor, value: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The maps after attention_map_, and the output; attention_with_map_ must make the same maps."""
    alone, fused = maps.clone(), maps.clone()
    attention_map_(alone, query, key, **options)
    out = attention_with_map_(fused, query, key, value, **options)
    torch.testing.assert_close(alone, fused, rtol=3e-6, atol=3e-6, equal_nan=True)
    return alone, out


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
OUTPUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_maps_are_sums_over_heads_of_the_softmax(path: str, shape: tuple[int, ...], dtype: torch.dtype, request):
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    tensors = problem(shape, dtype, path)
    maps, out = both(*tensors)
    maps_expected, out_expected = expected(*tensors)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(maps.double(), maps_expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    loose = OUTPUT_TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), out_expected, rtol=loose, atol=loose)


@pytest.mark.parametrize("keys", [257, 300])
def test_more_keys_than_one_tile_holds(path: str, keys: int):
    tensors = problem((2, 2, 1, 18, keys, 5, 6), torch.float32, path)
    group = torch.tensor([-1, 0], device=path)
    tokens = torch.tensor([keys - 1, 0, keys, 256, -1], device=path)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)).to(path) > 0.4
    weight = torch.tensor([0.5, 2.0], device=path)
    for options in (
        {"group": group},
        {"group": group, "mask": mask, "tokens": tokens, "head_weight": weight},
        {"group": group, "mask": mask[:, None, None, :].expand(2, 2, 18, keys), "tokens": tokens[:2]},
        {"tokens": tokens[:4]},
    ):
        first = tensors[0][..., : len(options["tokens"])] if "tokens" in options else tensors[0]
        maps, out = both(first, *tensors[1:], **options)
        maps_expected, out_expected = expected(first, *tensors[1:], **options)
        torch.testing.assert_close(maps.double(), maps_expected, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(out.double(), out_expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # with the output: two different kernels
@pytest.mark.parametrize("is_bias", [False, True], ids=["bool", "bias"])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_keys_have_probability_exactly_zero_whatever_they_hold(
    path: str, mask: str, is_bias: bool, dtype: torch.dtype
):
    shape = (2, 2, 1, 19, 11, 3, 3)
    maps, query, key, value = problem(shape, dtype, path)
    g = torch.Generator().manual_seed(5)
    kept = torch.rand(MASKS[mask](2, 2, 19, 11), generator=g).to(path) > 0.3
    kept[..., 4] = False
    kept[..., 0] = True
    bias = torch.randn(kept.shape, generator=g).to(path).masked_fill(~kept, -torch.inf)
    given = bias if is_bias else kept
    maps.zero_()
    clean, out = both(maps, query, key, value, mask=given)
    assert (clean[..., 4] == 0).all()
    maps_expected, out_expected = expected(maps, query, key, value, mask=given)
    torch.testing.assert_close(clean.double(), maps_expected, rtol=2e-6, atol=2e-6)
    loose = OUTPUT_TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), out_expected, rtol=loose, atol=loose)
    key[:, :, 4] = torch.nan
    torch.testing.assert_close(both(maps, query, key, value, mask=given)[0], clean, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_row_whose_keys_are_all_masked_is_zero(path: str, dtype: torch.dtype):
    maps, query, key, value = problem((2, 2, 2, 3, 5, 4, 4), dtype, path)
    maps.zero_()
    kept = torch.ones(2, 5, dtype=torch.bool, device=path)
    kept[1] = False
    lowest = torch.zeros(2, 5, device=path).masked_fill(~kept, torch.finfo(torch.float32).min)
    for mask in (kept, lowest):
        result, out = both(maps, query, key, value, mask=mask)
        assert (result[1] == 0).all()
        assert (out[1] == 0).all()
        assert (result[0].sum(-1) - 2).abs().max() < 1e-5
    far, clean = maps.clone(), maps.clone()
    attention_map_(far, query, key, mask=torch.full((2, 5), -1e4, device=path))  # the same for all keys, and no mask
    attention_map_(clean, query, key)
    torch.testing.assert_close(far, clean, rtol=1e-2, atol=1e-2)  # a score of 1e4 is known to 1e-3 in fp32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_groups_say_which_rows_count_and_where(path: str, dtype: torch.dtype):
    tensors = problem((5, 2, 2, 17, 6, 4, 4), dtype, path)
    maps = tensors[0][:3].contiguous()
    for index in (torch.int32, torch.int64):
        group = torch.tensor([2, -1, 0, 2, 3], dtype=index, device=path)  # 3: there is no such map
        result, out = both(maps, *tensors[1:], group=group)
        maps_expected, out_expected = expected(maps, *tensors[1:], group=group)
        torch.testing.assert_close(result.double(), maps_expected, rtol=2e-6, atol=2e-6)
        loose = OUTPUT_TOLERANCE[dtype]
        torch.testing.assert_close(out.double(), out_expected, rtol=loose, atol=loose)
        assert torch.equal(result[1], maps[1])
    nothing = torch.full((5,), -1, device=path)
    assert torch.equal(both(maps, *tensors[1:], group=nothing)[0], maps)


def test_weights_of_heads_and_chosen_tokens(path: str):
    maps, query, key, value = problem((2, 4, 2, 18, 9, 5, 5), torch.float32, path)
    weight = torch.tensor([0.0, 1.5, -2.0, 0.25], device=path)
    for tokens in ([3, 0, 3], [8], [9, 2, -1]):  # repeats; out of range
        chosen = torch.tensor(tokens, dtype=torch.int32, device=path)
        part = maps[..., : len(tokens)].contiguous()
        result, _ = both(part, query, key, value, scale=0.7, head_weight=weight, tokens=chosen)
        wanted, _ = expected(part, query, key, value, scale=0.7, head_weight=weight, tokens=chosen)
        torch.testing.assert_close(result.double(), wanted, rtol=3e-6, atol=3e-6)
        assert torch.equal(result[..., -1], part[..., -1]) == (tokens[-1] < 0)


def test_all_tokens_of_a_position_sum_to_the_weights(path: str):
    maps, query, key, _ = problem((1, 3, 3, 21, 13, 8, 8), torch.float32, path)
    maps.zero_()
    weight = torch.tensor([0.5, 2.0, 1.0], device=path)
    attention_map_(maps, query, key, head_weight=weight)
    torch.testing.assert_close(maps.sum(-1), torch.full_like(maps[..., 0], 3.5), rtol=1e-6, atol=0)


def test_probabilities_read_out_by_one_hot_values_are_the_same(path: str):
    """An independent way to the same numbers: torch's own attention, with one-hot vectors for values."""
    maps, query, key, _ = problem((2, 3, 3, 19, 7, 12, 12), torch.float64, "cpu")
    one_hot = torch.eye(7, dtype=torch.float64).expand(2, 3, 7, 7)
    summed = F.scaled_dot_product_attention(query, key, one_hot).sum(1)
    attention = [t.float().to(path) for t in (torch.zeros_like(maps), query, key)]
    attention_map_(*attention)
    torch.testing.assert_close(attention[0].double().cpu(), summed, rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow(path: str):
    maps, query, key, value = problem((1, 2, 2, 17, 6, 4, 4), torch.float32, path)
    maps.zero_()
    result, out = both(maps, query * 1e4, key * 1e4, value)
    assert result.isfinite().all()
    assert out.isfinite().all()
    torch.testing.assert_close(result.sum(-1), torch.full_like(result[..., 0], 2.0))
    assert (result.amax(-1) > 0.99).all()


def test_a_broken_row_breaks_only_itself(path: str):
    maps, query, key, value = problem((1, 2, 2, 18, 6, 4, 4), torch.float32, path)
    clean, _ = both(maps, query, key, value)
    query = query.clone()
    query[0, 1, 3, 2] = torch.nan
    result, out = both(maps, query, key, value)
    assert result[0, 3].isnan().all()
    assert out[0, 1, 3].isnan().all()
    result[0, 3] = clean[0, 3]
    assert torch.equal(result, clean)


def test_the_same_bits_every_run_and_strides_are_free(path: str):
    maps, query, key, value = problem((3, 2, 2, 35, 20, 6, 6), torch.float32, path)
    options = {"group": torch.tensor([0, 0, 1], device=path)}
    results = [both(maps, query, key, value, **options) for _ in range(3)]
    for again in results[1:]:
        assert torch.equal(again[0], results[0][0])
        assert torch.equal(again[1], results[0][1])
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)  # the accumulator with tokens first
    attention_map_(
        strided, query[..., [0, 1, 2, 3, 4, 5]].contiguous(), key.repeat_interleave(2, -1)[..., ::2], **options
    )
    torch.testing.assert_close(strided, results[0][0], rtol=2e-6, atol=2e-6)


def test_nothing_to_attend_to_or_from(path: str):
    maps, query, key, value = problem((2, 2, 2, 5, 3, 4, 4), torch.float32, path)
    attention_map_(maps[:, :0], query[:, :, :0], key)
    attention_map_(maps[..., :0], query, key, tokens=torch.zeros(0, dtype=torch.int32, device=path))
    before = maps.clone()
    attention_map_(maps, query[:0], key[:0])
    assert torch.equal(maps, before)
    out = attention_with_map_(maps[..., :0], query, key[:, :, :0], value[:, :, :0])
    assert torch.equal(out, torch.zeros(2, 2, 5, 4, device=path))
    empty = torch.zeros(0, 5, 3, device=path)
    assert both(empty, query, key, value, group=torch.zeros(2, dtype=torch.int32, device=path))[1].isfinite().all()


@pytest.mark.parametrize("block_bytes", [1, 300, 5000])
def test_blocks_of_any_size_give_the_maps_and_output_of_the_reference_to_rounding(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
):
    tensors = problem((2, 3, 1, 70, 9, 4, 4), torch.float64, "cpu")
    monkeypatch.setattr(scores, "BLOCK_BYTES", block_bytes)
    for ours, theirs in zip(both(*tensors), expected(*tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_compiled_to_one_graph_and_counted_by_the_flop_counter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # real memory: torch traces the programs that allocate
    tensors = problem((2, 3, 3, 19, 7, 4, 5), torch.float32, "cpu")
    group = torch.tensor([-1, 1])

    def run(maps, query, key, value):
        attention_map_(maps, query, key, group=group)
        return attention_with_map_(maps, query, key, value), attention_rows(query, key)[0]

    eager, compiled = tensors[0].clone(), tensors[0].clone()
    with FlopCounterMode(display=False) as counter:
        wanted = run(eager, *tensors[1:])
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(compiled, *tensors[1:])
    torch.testing.assert_close((compiled, *got), (eager, *wanted))
    assert counter.get_total_flops() == 2 * 2 * 3 * 19 * 7 * (4 + (4 + 5) + 4)


MISTAKES: dict[str, Callable[..., dict]] = {
    "query must be": lambda maps, q, k: {"query": q[0]},
    "query must be float32": lambda maps, q, k: {"query": q.int()},
    "key must be": lambda maps, q, k: {"key": k[..., :2]},
    "key must have a number of heads that divides query's 2, got 3": lambda maps, q, k: {"key": k[:, [0, 0, 0]]},
    "key must have query's dtype": lambda maps, q, k: {"key": k.half()},
    "maps must be": lambda maps, q, k: {"maps": maps[:, :-1]},
    "maps must be torch.float32": lambda maps, q, k: {"maps": maps.double()},
    "maps is written in place and must not be expanded": lambda maps, q, k: {"maps": maps[:1].expand(4, -1, -1)},
    "mask must be bool": lambda maps, q, k: {"mask": torch.ones(2, 3, dtype=torch.int32)},
    "mask must be .batch, t. = .2, 3.": lambda maps, q, k: {"mask": torch.ones(5, 3)},
    "head_weight must have shape": lambda maps, q, k: {"head_weight": torch.ones(3)},
    "head_weight must be floating": lambda maps, q, k: {"head_weight": torch.ones(2, dtype=torch.int32)},
    "group must have shape": lambda maps, q, k: {"group": torch.zeros(3, dtype=torch.int32)},
    "group must be int32": lambda maps, q, k: {"group": torch.zeros(2)},
    "tokens must be int32": lambda maps, q, k: {"tokens": torch.zeros(3)},
    "tokens must have one dimension": lambda maps, q, k: {"tokens": torch.zeros(1, 3, dtype=torch.int32)},
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    maps, query, key, value = problem((2, 2, 2, 5, 3, 4, 4), torch.float32, "cpu")
    arguments = {"maps": maps, "query": query, "key": key} | MISTAKES[named](maps, query, key)
    with pytest.raises((ValueError, TypeError), match=named):
        attention_map_(**arguments)
    with pytest.raises((ValueError, TypeError), match=named):
        attention_with_map_(**arguments, value=value)


def test_a_value_that_does_not_fit_is_refused():
    maps, query, key, value = problem((2, 2, 2, 5, 3, 4, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="value must be"):
        attention_with_map_(maps, query, key, value[:, :, :2])
    with pytest.raises(TypeError, match="value must have query's dtype"):
        attention_with_map_(maps, query, key, value.half())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("more", [-2, 0], ids=["below", "from it on"])
@pytest.mark.parametrize("kept", [map_cpu.FEWEST_POSITIONS, 2 * map_cpu.FEWEST_POSITIONS])
def test_both_sides_of_the_sizes_from_which_a_call_is_conducted_and_its_positions_are_handed_out(
    kept: int, more: int, batch: int, monkeypatch: pytest.MonkeyPatch
):
    """On two threads: each map is one's, and of one map each has a half where that is long enough."""
    heads, tokens = 4, 16
    positions = kept + more
    tensors = problem((batch, heads, heads, positions, tokens, 4, 4), torch.float32, "cpu")
    monkeypatch.setattr(map_cpu, "CONDUCTED_SCORES", batch * heads * map_cpu.FEWEST_POSITIONS * tokens)
    handed_out = []
    inner = map_cpu.together
    monkeypatch.setattr(
        map_cpu, "together", lambda tasks: handed_out.append((map_cpu.threads(), len(tasks))) or inner(tasks)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        maps, out = both(*tensors)
    finally:
        torch.set_num_threads(before)
    assert len(handed_out) == 2
    if positions < map_cpu.FEWEST_POSITIONS:
        assert set(handed_out) == {(1, batch)}
    else:
        halves = batch == 1 and positions >= 2 * map_cpu.FEWEST_POSITIONS
        assert set(handed_out) == {(2, 2 if halves else batch)}
    maps_expected, out_expected = expected(*tensors)
    torch.testing.assert_close(maps.double(), maps_expected, rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(out.double(), out_expected, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_without_a_probability_among_many_positions(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Grouped queries, several blocks of rows: a row of NaN, one whose scores are all -inf, and a batch row that is not
    counted."""
    monkeypatch.setattr(scores, "BLOCK_BYTES", 64 << 10)
    batch, n = 3, 768
    maps, query, key, value = problem((batch, 4, 2, n, 9, 8, 5), dtype, "cpu")
    key = key.abs() + 0.1
    query[0, 1, 300], query[1, 2, 301] = torch.nan, -torch.inf
    options = {
        "head_weight": torch.tensor([0.5, -2.0, 1.0, 0.25]),
        "group": torch.tensor([1, 0, -1]),
        "tokens": torch.tensor([8, 0, 9]),
    }
    maps_expected, out_expected = expected(maps[:2, :, :3], query, key, value, **options)
    seen, out = both(maps[:2, :, :3], query, key, value, **options)
    assert seen[1, 300, :2].isnan().all()
    assert not seen[:, 301].isnan().any()
    assert not out[1, 2, 301].any()
    torch.testing.assert_close(seen.double(), maps_expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    loose = OUTPUT_TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), out_expected, rtol=loose, atol=loose, equal_nan=True)


@pytest.mark.parametrize("programs", [1, 8, 264])
def test_heads_that_are_shared_out_add_up_to_the_same_maps(programs: int, monkeypatch: pytest.MonkeyPatch):
    """Of 2 blocks of rows and 2 batch rows: all 5 heads in one program, in two, and each in one of its own."""
    if not TRITON_AVAILABLE:
        pytest.skip("Triton is not installed")
    monkeypatch.setattr(map_module, "PROGRAMS", programs)
    tensors = problem((2, 5, 5, 19, 7, 4, 4), torch.float16, "cpu")
    options = {"head_weight": torch.tensor([0.5, 2.0, 1.0, -1.0, 0.25]), "group": torch.tensor([1, 1])}
    with force_triton():
        maps, out = both(*tensors, **options)
    wanted, wanted_out = expected(*tensors, **{**options, "head_weight": options["head_weight"].double()})
    torch.testing.assert_close(maps.double(), wanted, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(out.double(), wanted_out, rtol=3e-3, atol=3e-3)
