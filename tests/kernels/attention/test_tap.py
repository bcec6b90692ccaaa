"""attention_tap_ and attention_tap_local_ against their dense reference in fp64."""

from collections.abc import Callable

import pytest
import torch
from sparsefeat_kernels import attention_rows, attention_tap_, attention_tap_local_
from sparsefeat_kernels.attention.tap import reference
from torch import Tensor

# batch, heads, key heads, queries of the attention, rows read, keys of the attention, keys read, d
SHAPES = {
    "odd": (2, 3, 3, 25, 19, 31, 7, 3),
    "grouped": (1, 4, 2, 20, 5, 40, 18, 40),
    "wide": (1, 2, 1, 17, 17, 33, 33, 72),
    "one": (1, 1, 1, 1, 1, 1, 1, 1),
}


def problem(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """maps (not zero), the query's last rows, the first keys, the whole attention's probabilities there (fp64), and its
    log-sum-exp: a joint attention with the text first."""
    batch, heads, key_heads, queries, n, keys, t, d = shape
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, heads, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    key = torch.randn(batch, keys, key_heads, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    maps = torch.randn(batch, n, t, generator=g, dtype=torch.float64).to(wide)
    scores = (
        torch.einsum("bhnd,bhtd->bhnt", query.double(), key.double().repeat_interleave(heads // key_heads, 1)) / d**0.5
    )
    probabilities, lse = scores.softmax(-1)[:, :, -n:, :t], scores.logsumexp(-1)[:, :, -n:]
    tensors = maps, query[:, :, -n:], key[:, :, :t], probabilities, lse.to(wide)
    return tuple(tensor.to(device) for tensor in tensors)


def expected(maps, query, key, lse, scale=None, mask=None, head_weight=None, group=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = torch.arange(query.shape[0]) if group is None else group
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    return reference(*(t.double() for t in (maps, query, key, lse)), scale, mask, head_weight, group)


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(actual.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_columns_are_those_of_the_whole_attention(path: str, shape: tuple[int, ...], dtype: torch.dtype, request):
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    maps, query, key, probabilities, lse = problem(shape, dtype, path)
    wanted = maps.double() + probabilities.sum(1)
    close(expected(maps, query, key, lse), wanted)
    attention_tap_(maps, query, key, lse)
    close(maps, wanted, dtype)


@pytest.mark.parametrize("keys", [150])
def test_several_blocks_of_keys_weights_groups_and_masks(path: str, keys: int):
    maps, query, key, _, lse = problem((4, 2, 1, 20, 18, keys + 9, keys, 5), torch.float32, path)
    g = torch.Generator().manual_seed(2)
    kept = torch.rand(4, keys, generator=g).to(path) > 0.3
    bias = torch.randn(1, 1, 18, keys, generator=g).to(path)
    maps, weight = maps[:2].contiguous(), torch.tensor([0.5, -2.0], device=path)
    group = torch.tensor([1, -1, 1, 2], dtype=torch.int32, device=path)  # 2: there is no such map
    for mask in (None, kept, bias):
        result = maps.clone()
        attention_tap_(result, query, key, lse, 0.3, mask, weight, group)
        close(result, expected(maps, query, key, lse, 0.3, mask, weight, group))
        assert torch.equal(result[0], maps[0])


def test_masked_keys_have_probability_exactly_zero_whatever_they_hold(path: str):
    maps, query, key, _, lse = problem((1, 2, 2, 9, 9, 12, 5, 4), torch.float32, path)
    maps.zero_()
    key = key.contiguous()
    key[:, :, 2] = torch.nan
    kept = torch.tensor([[True, True, False, True, True]], device=path)
    attention_tap_(maps, query, key, lse, mask=kept)
    assert (maps[..., 2] == 0).all()
    assert maps.isfinite().all()
    attention_tap_(maps.zero_(), query, key, torch.full_like(lse, -torch.inf), mask=torch.zeros_like(kept))
    assert (maps == 0).all()


def test_large_scores_do_not_overflow(path: str):
    _, query, key, _, _ = problem((1, 2, 2, 9, 9, 12, 12, 4), torch.float32, path)
    query, key = query * 1e3, key * 1e3
    lse = attention_rows(query, key)[0]
    maps = torch.zeros(1, 9, 12, device=path)
    attention_tap_(maps, query, key, lse)
    # A score of 1e6 is known to 0.06 in fp32: its probabilities sum to 1 no better than that.
    assert ((maps.sum(-1) - 2).abs() < 0.5).all()


def test_the_same_bits_every_run_and_strides_are_free(path: str):
    maps, query, key, _, lse = problem((2, 2, 2, 40, 35, 40, 20, 6), torch.float32, path)
    results = []
    for _ in range(3):
        results.append(maps.clone())
        attention_tap_(results[-1], query, key, lse, group=torch.tensor([1, 1], device=path))
        assert torch.equal(results[-1], results[0])
    strided = maps.transpose(1, 2).contiguous().transpose(1, 2)
    attention_tap_(
        strided, query.contiguous(), key.repeat_interleave(2, -1)[..., ::2], lse.mT.contiguous().mT,
        group=torch.tensor([1, 1], device=path),
    )  # fmt: skip
    close(strided, results[0])


def test_without_a_log_sum_exp_the_softmax_is_over_the_keys_given(path: str):
    maps, query, key, _, _ = problem((2, 2, 1, 9, 9, 12, 5, 4), torch.float32, path)
    shared = key.double().repeat_interleave(2, 1)
    scores = torch.einsum("bhnd,bhtd->bhnt", query.double(), shared) * 0.7
    wanted = maps.double() + scores.softmax(-1).sum(1)
    attention_tap_local_(maps, query, key, 0.7)
    close(maps, wanted)


def test_nothing_to_read(path: str):
    maps, query, key, _, lse = problem((2, 2, 2, 9, 9, 12, 5, 4), torch.float32, path)
    attention_tap_(maps[:, :0], query[:, :, :0], key, lse[:, :, :0])
    attention_tap_(maps[..., :0], query, key[:, :, :0], lse)
    before = maps.clone()
    attention_tap_(maps, query[:0], key[:0], lse[:0])
    assert torch.equal(maps, before)


MISTAKES: dict[str, Callable[..., dict]] = {
    "query must be": lambda maps, q, k, lse: {"query": q[0]},
    "maps must be": lambda maps, q, k, lse: {"maps": maps[:, :-1]},
    "lse must be .batch, heads, n.": lambda maps, q, k, lse: {"lse": lse[:, :, :-1]},
    "lse must be torch.float32": lambda maps, q, k, lse: {"lse": lse.half()},
    "group must have shape": lambda maps, q, k, lse: {"group": torch.zeros(3, dtype=torch.int32)},
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    maps, query, key, _, lse = problem((2, 2, 2, 5, 5, 3, 3, 4), torch.float32, "cpu")
    arguments = {"maps": maps, "query": query, "key": key, "lse": lse} | MISTAKES[named](maps, query, key, lse)
    with pytest.raises((ValueError, TypeError), match=named):
        attention_tap_(**arguments)


def test_the_query_is_not_copied(one_thread):
    maps, query, key, _, lse = problem((1, 8, 8, 4096, 4096, 8, 8, 40), torch.float32, "cpu")  # 5 MiB of queries
    with torch.profiler.profile(profile_memory=True) as profile:
        attention_tap_(maps, query, key, lse)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 5 << 18
