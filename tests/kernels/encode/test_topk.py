"""topk_encode against its reference in fp64: a set comparison that knows the rounding bound of the arithmetic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import force_triton, topk_encode
from sparsefeat_kernels.encode import cpu, product
from sparsefeat_kernels.encode.gpu.topk import selects
from sparsefeat_kernels.encode.topk import SELECTIONS, reference
from torch import Tensor

# rows, d, n_latents, k: odd sizes, one block and several, k from 1 to n_latents, groups cut off by the end
SHAPES = {
    "small": (5, 7, 33, 4),
    "one": (1, 1, 1, 1),
    "all": (3, 5, 9, 9),
    "first": (4, 8, 70, 1),
    "groups": (3, 20, 300, 5),
    "large_k": (2, 6, 60, 40),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # bfloat16 is wrong in the interpreter


def problem(rows: int, d: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,))
    return tuple(torch.randn(size, generator=g).to(dtype).to(device) for size in sizes)


def rounding_bound(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor) -> Tensor:
    """[rows, 1]: what a sum of d products in fp32, in any order, with or without centring first, can be off by."""
    size = (x.double().abs() + b_pre.double().abs()) @ W_enc.double().abs().T + b_enc.double().abs()
    return (x.shape[1] + 4) * 2.0**-24 * size.amax(dim=1, keepdim=True)


def assert_is_topk(
    values: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, selection: str
) -> None:
    a = (x.double() - b_pre.double()) @ W_enc.double().T + b_enc.double()
    epsilon = rounding_bound(x, W_enc, b_enc, b_pre)
    score = a.abs() if selection == "signed" else a
    chosen = torch.zeros_like(a, dtype=torch.bool).scatter_(1, indices.long(), True)
    assert (chosen.sum(1) == indices.shape[1]).all(), "an index appears twice"
    lowest_in = score.masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    highest_out = score.masked_fill(chosen, -torch.inf).amax(1, keepdim=True)
    assert (highest_out - lowest_in <= 2 * epsilon).all()
    expected = a.gather(1, indices.long())
    expected = expected.relu() if selection == "relu" else expected
    assert ((values.double() - expected).abs() <= epsilon).all()
    size = values.abs() if selection == "signed" else values
    falls = size[:, :-1] > size[:, 1:]
    ties_by_index = (size[:, :-1] == size[:, 1:]) & (indices[:, :-1] < indices[:, 1:])
    assert (falls | ties_by_index).all(), "not sorted by value, then index"


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_k_largest_within_the_rounding_bound(path: str, shape: tuple[int, int, int, int], dtype: torch.dtype):
    rows, d, n, k = shape
    inputs = problem(rows, d, n, dtype, path)
    for selection in SELECTIONS if shape == SHAPES["small"] else ("relu",):
        values, indices = topk_encode(*inputs, k, selection)
        assert values.dtype == torch.float32
        assert indices.dtype == torch.int32
        assert_is_topk(values, indices, *inputs, selection)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_cpu_path_at_sizes_with_many_groups_and_chunks(selection: str, dtype: torch.dtype, monkeypatch):
    # 48 KiB of pre-activations: the 41 rows come in several chunks, the weights in several tiles
    monkeypatch.setattr(cpu, "PREACTIVATION_BYTES", 48 << 10)
    monkeypatch.setattr(product, "WEIGHT_TILE_BYTES", 16 << 10)
    monkeypatch.setattr(cpu, "SELECTION_BYTES", 4 << 10)
    inputs = problem(41, 24, 1501, dtype, "cpu")
    values, indices = topk_encode(*inputs, 7, selection)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_is_topk(values, indices, *inputs, selection)
    expected_values, expected_indices = reference(*(t.double() for t in inputs), 7, selection)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values.double(), expected_values, atol=1e-4, rtol=1e-4)


def test_a_k_that_is_a_large_part_of_the_latents_on_the_triton_path():
    assert not selects(70, 30)
    inputs = problem(3, 5, 70, torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    with force_triton():
        for selection in SELECTIONS:
            assert_is_topk(*topk_encode(*inputs, 30, selection), *inputs, selection)


# ------------------------------------------------------------------------------------------- exact: a given row of a


def preactivations(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs whose pre-activations are `a` [n] exactly: one input that is 1."""
    one = torch.ones(1, 1, dtype=a.dtype, device=a.device)
    return one, a[:, None].clone(), torch.zeros_like(a), torch.zeros_like(one[0])


def row_of(rows: dict[str, list[float]], name: str, device: str) -> Tensor:
    """The row; on a GPU, whose kernels multiply bf16 parts of fp32, with the smallest and the largest numbers that have
    such parts."""
    a = torch.tensor(rows[name], device=device)
    if device == "cuda" and name == "denormals":
        return a * 2.0**24
    largest = torch.finfo(torch.bfloat16).max
    return a.clamp(-largest, largest) if device == "cuda" and name == "extremes" else a


def assert_same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[0].double().cpu(), expected[0].double().cpu(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(got[1].cpu(), expected[1].cpu())


NAN, INF = torch.nan, torch.inf
ROWS_OF_A = {
    "all_equal": [2.0] * 37,
    "all_zero": [0.0] * 37,
    "signed_zeros": [-0.0, 0.0] * 9 + [-1.0],
    "tie_at_the_last_place": [1.0, 5.0, 1.0, 7.0, 1.0, 1.0, 6.0] * 3,
    "fewer_than_k_positive": [-3.0, 2.0, -1.0, -1.0, -0.5, 0.0, -2.0, 1.0],
    "none_positive": [-3.0, -2.0, -1.0, -4.0, -5.0, -6.0],
    "one_nan": [1.0] * 30 + [NAN] + [2.0] * 8,
    "negative_nan": [-NAN, 3.0, 2.0, 1.0, 0.0, 5.0],
    "infinities": [1.0, -INF, INF, 0.0, INF, -INF, 2.0],
    "all_minus_infinity": [-INF] * 21,
    "denormals": [1e-45, 3e-45, -1e-45, 0.0, 2e-45, 1e-38],
    "extremes": [3.4e38, -3.4e38, 1.0, -1.0, 3.4e38, 0.0],
}


@pytest.mark.parametrize("name", ROWS_OF_A)
def test_ties_nan_infinity_and_zeros(path: str, name: str):
    inputs = preactivations(row_of(ROWS_OF_A, name, path))
    for selection in SELECTIONS:
        for k in (1, 5) if path == "cpu" else (5,):
            assert_same(topk_encode(*inputs, k, selection), reference(*(t.double() for t in inputs), k, selection))


wild = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF])


@settings(max_examples=60)
@given(st.lists(wild, min_size=1, max_size=90), st.data())
def test_any_row_of_floats_is_selected_exactly(a: list[float], data: st.DataObject):
    k = data.draw(st.integers(1, len(a)))
    selection = data.draw(st.sampled_from(SELECTIONS))
    inputs = preactivations(torch.tensor(a, dtype=torch.float32))
    assert_same(topk_encode(*inputs, k, selection), reference(*(t.double() for t in inputs), k, selection))


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.integers(0, 6), st.integers(1, 5), st.integers(1, 130), st.data())
def test_small_integers_which_tie_constantly_are_exact(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    g = torch.Generator().manual_seed(seed)
    inputs = tuple(torch.randint(-2, 3, s, generator=g).float() for s in ((rows, d), (n, d), (n,), (d,)))
    k, selection = data.draw(st.integers(1, n)), data.draw(st.sampled_from(SELECTIONS))
    assert_same(topk_encode(*inputs, k, selection), reference(*(t.double() for t in inputs), k, selection))


def test_only_rows_with_nan_are_broken(path: str):
    x, W, b, p = problem(4, 6, 40, torch.float32, path)
    x[2, 3] = torch.nan
    values, indices = topk_encode(x, W, b, p, 5)
    assert values[2].isnan().all()
    assert indices[2].tolist() == [0, 1, 2, 3, 4]
    kept = [0, 1, 3]
    assert_is_topk(values[kept], indices[kept], x[kept], W, b, p, "relu")


# ------------------------------------------------------------------------------------------------ shapes and strides


def test_zero_rows(path: str):
    _, W, b, p = problem(1, 6, 40, torch.float32, path)
    values, indices = topk_encode(torch.zeros(0, 6, device=path), W, b, p, 5)
    assert values.shape == indices.shape == (0, 5)


def test_strided_inputs_give_the_bits_of_contiguous_ones(path: str):
    x, W, b, p = problem(3, 8, 50, torch.float32, path)
    strided = (
        x.repeat_interleave(2, 1)[:, ::2],
        W.T.contiguous().T,
        b.repeat_interleave(3)[::3],
        p.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    expected_values, expected_indices = topk_encode(x, W, b, p, 4)
    values, indices = topk_encode(*strided, 4)
    assert torch.equal(indices, expected_indices)
    torch.testing.assert_close(values, expected_values, rtol=1e-6, atol=1e-6)


def test_the_same_bits_every_time(path: str):
    inputs = problem(3, 9, 60, torch.float32, path)
    first, second = topk_encode(*inputs, 6), topk_encode(*inputs, 6)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_scratch_does_not_grow_with_rows(one_thread):
    x, W, b, p = problem(3000, 2, 4000, torch.float32, "cpu")  # 48 MB of pre-activations at once
    with torch.profiler.profile(profile_memory=True) as profile:
        topk_encode(x, W, b, p, 2)
    assert max(event.cpu_memory_usage for event in profile.events()) <= 26 << 20


MISTAKES = {
    "x": (lambda x, W, b, p: (x[None], W, b, p, 2), ValueError),
    "W_enc": (lambda x, W, b, p: (x, W[:, :-1], b, p, 2), ValueError),
    "b_enc": (lambda x, W, b, p: (x, W, b[:-1], p, 2), ValueError),
    "b_pre": (lambda x, W, b, p: (x, W, b, p.double(), 2), TypeError),
    "x must be float": (lambda x, W, b, p: (x.int(), W, b, p, 2), TypeError),
    "k must": (lambda x, W, b, p: (x, W, b, p, 12), ValueError),
    "k must be": (lambda x, W, b, p: (x, W, b, p, 0), ValueError),
    "selection": (lambda x, W, b, p: (x, W, b, p, 2, "largest"), ValueError),
    "device": (lambda x, W, b, p: (x, W.to("meta"), b, p, 2), (ValueError, RuntimeError, NotImplementedError)),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    change, error = MISTAKES[named]
    with pytest.raises(error, match=named):
        topk_encode(*change(*problem(3, 4, 11, torch.float32, "cpu")))


# ------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("selection", SELECTIONS)
def test_gradcheck_on_the_cpu_path(selection: str):
    inputs = [t.requires_grad_() for t in problem(4, 3, 11, torch.float64, "cpu")]
    assert torch.autograd.gradcheck(lambda *t: topk_encode(*t, 3, selection)[0], inputs)


@pytest.mark.parametrize("selection", ["relu", "signed"])
def test_gradients_are_those_of_the_reference(path: str, selection: str):
    inputs = problem(5, 7, 33, torch.float32, path, seed=3)
    inputs[2].sub_(1.5)  # some rows have fewer than k positive values
    weight = torch.linspace(-1, 1, 20, device=path).view(5, 4)
    got = [t.clone().requires_grad_() for t in inputs]
    (topk_encode(*got, 4, selection)[0] * weight).sum().backward()
    expected = [t.double().requires_grad_() for t in inputs]
    (reference(*expected, 4, selection)[0] * weight).sum().backward()
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_a_value_of_zero_gets_no_gradient(path: str):
    x, W, b, p = preactivations(torch.tensor([-1.0, 2.0, -3.0, 0.0], device=path))
    W.requires_grad_()
    topk_encode(x, W, b, p, 3)[0].sum().backward()
    assert W.grad[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0]
