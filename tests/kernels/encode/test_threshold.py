"""threshold_encode and its CSR form against the dense reference in fp64, on pre-activations away from the threshold, and
exactly on pre-activations that are given."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import (
    SparseCode,
    force_triton,
    prepare_encoder,
    threshold_encode,
    threshold_encode_csr,
)
from sparsefeat_kernels.encode import threshold_cpu
from sparsefeat_kernels.encode.gpu import tiles
from sparsefeat_kernels.encode.threshold import reference
from torch import Tensor

from tests.kernels.encode.test_topk import row_of

# rows, d, n_latents, max_active: odd sizes, one tile of latents and several, one that is cut off by the end
SHAPES = {
    "small": (5, 7, 33, 12),
    "one": (1, 1, 1, 1),
    "all": (3, 5, 9, 9),
    "tiles": (3, 20, 300, 160),
    "rows": (70, 3, 130, 70),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}  # bfloat16 is wrong in the interpreter
NAN, INF = torch.nan, torch.inf


def problem(rows: int, d: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs and a threshold a latent that no pre-activation comes near."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,))
    x, W_enc, b_enc, b_pre = (torch.randn(size, generator=g).to(dtype) for size in sizes)
    threshold = torch.rand(n, generator=g) * 2 - 0.3  # some are negative: a ReLU
    if rows:
        a = (x.double() - b_pre.double()) @ W_enc.double().T + b_enc.double()
        for _ in range(100):
            near = ((a - threshold.clamp(min=0)).abs() < 1e-4).any(0)
            threshold = torch.where(near, threshold.clamp(min=0) + 3e-4, threshold)
        assert not near.any()
    return tuple(t.to(device) for t in (x, W_enc, b_enc, b_pre, threshold))


def expected(inputs: tuple[Tensor, ...], max_active: int) -> tuple[Tensor, Tensor, Tensor]:
    return reference(*(t.cpu().double() for t in inputs), max_active)


def assert_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 0) -> None:
    torch.testing.assert_close(got[0].double().cpu(), wanted[0], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(got[1].cpu(), wanted[1])
    assert torch.equal(got[2].cpu(), wanted[2])


def assert_csr_same(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...], tolerance: float = 0) -> None:
    """`wanted` is the reference with a place for every latent."""
    values, indices, row_offsets = (t.cpu() for t in got)
    assert row_offsets.dtype == torch.int64
    assert row_offsets[0] == 0
    assert torch.equal(row_offsets.diff().int(), wanted[2])
    slots = torch.arange(wanted[0].shape[1])[None] < wanted[2][:, None]
    torch.testing.assert_close(values.double(), wanted[0][slots], rtol=tolerance, atol=tolerance, equal_nan=True)
    assert torch.equal(indices, wanted[1][slots])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_active_latent_in_index_order(path: str, shape: tuple[int, int, int, int], dtype: torch.dtype):
    rows, d, n, max_active = shape
    inputs = problem(rows, d, n, dtype, path)
    values, indices, counts = got = threshold_encode(*inputs, max_active)
    assert (values.dtype, indices.dtype, counts.dtype) == (torch.float32, torch.int32, torch.int32)
    assert_same(got, expected(inputs, max_active), 1e-4)
    assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, n), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_cpu_path_in_many_chunks_and_blocks(dtype: torch.dtype, monkeypatch):
    # 48 KiB of pre-activations: the 41 rows come in several chunks, which are compacted in several blocks of two rows
    monkeypatch.setattr(threshold_cpu, "PREACTIVATION_BYTES", 48 << 10)
    monkeypatch.setattr(threshold_cpu, "COMPACTED_ENTRIES", 3100)
    inputs = problem(41, 24, 1501, dtype, "cpu")
    values, *_ = got = threshold_encode(*inputs, 600)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(got, expected(inputs, 600), 1e-4)
    assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, 1501), 1e-4)


def test_triton_path_in_many_chunks_and_many_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 5 * 1408 * 3)  # three rows of the CSR form, one tile of the padded
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = problem(7, 5, 1300, torch.float32, device)
    with force_triton():
        assert_same(threshold_encode(*inputs, 500), expected(inputs, 500), 1e-4)
        assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, 1300), 1e-4)


def test_triton_counts_go_from_chunk_to_chunk_of_latents_with_nan_in_any_of_them(monkeypatch):
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 5 * 128 * 64)  # one tile
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randint(-3, 4, (500,), generator=torch.Generator().manual_seed(0)).float().to(device)
    for broken in (None, 5, 300, 499):
        if broken is not None:
            a[broken] = NAN
        inputs = (*preactivations(a), torch.tensor(1.0, device=device))
        with force_triton():
            for max_active in (1, 60, 500):
                assert_same(threshold_encode(*inputs, max_active), expected(inputs, max_active))


def test_an_overflowing_row_keeps_its_lowest_indices_and_its_true_count(path: str):
    inputs = preactivations(torch.tensor([1.0, -1.0, 5.0, 2.0, 0.0, 9.0, 3.0], device=path))
    values, indices, counts = threshold_encode(*inputs, torch.tensor(0.5, device=path), 3)
    assert values.tolist() == [[1.0, 5.0, 2.0]]
    assert indices.tolist() == [[0, 2, 3]]
    assert counts.tolist() == [5]


def test_a_row_with_room_to_spare_ends_in_zeros_at_index_zero(path: str):
    inputs = preactivations(torch.tensor([1.0, -1.0, 5.0, 2.0, 0.0, 9.0, 3.0], device=path))
    values, indices, counts = threshold_encode(*inputs, torch.tensor(2.0, device=path), 5)
    assert values.tolist() == [[5.0, 9.0, 3.0, 0.0, 0.0]]
    assert indices.tolist() == [[2, 5, 6, 0, 0]]
    assert counts.tolist() == [3]


# ------------------------------------------------------------------------------------------- exact: a given row of a


def preactivations(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs whose pre-activations are `a` [n] exactly: one input that is 1."""
    one = torch.ones(1, 1, dtype=a.dtype, device=a.device)
    return one, a[:, None].clone(), torch.zeros_like(a), torch.zeros_like(one[0])


ROWS_OF_A = {
    "equal_to_the_threshold": [2.0] * 37,
    "all_zero": [0.0, -0.0] * 20,
    "none_positive": [-3.0, -2.0, -1.0, -INF],
    "all_active": [7.0] * 200,
    "one_nan": [3.0] * 30 + [NAN] + [2.0] * 8,
    "nan_in_the_last_tile": [3.0] * 290 + [-NAN],
    "all_nan": [NAN] * 5,
    "infinities": [1.0, -INF, INF, 0.0, INF, -INF, 2.0],
    "denormals": [1e-45, 3e-45, -1e-45, 0.0, 2e-45, 1e-38],
    "extremes": [3.4e38, -3.4e38, 1.0, -1.0, 3.4e38, 0.0],
}
THRESHOLDS = {"relu": 0.0, "above": 2.0, "negative": -1.0, "infinite": INF, "minus_infinite": -INF, "nan": NAN}


@pytest.mark.parametrize("name", ROWS_OF_A)
def test_equality_nan_infinity_and_zeros(path: str, name: str):
    a = row_of(ROWS_OF_A, name, path)
    for threshold in THRESHOLDS.values():
        inputs = (*preactivations(a), torch.tensor(threshold, device=path))
        for max_active in {1, min(5, len(a))}:
            assert_same(threshold_encode(*inputs, max_active), expected(inputs, max_active))
        values, indices, row_offsets = threshold_encode_csr(*inputs)
        if a.isnan().any():
            assert (values.isnan().tolist(), indices.tolist(), row_offsets.tolist()) == ([True], [0], [0, 1])
        else:
            assert_csr_same((values, indices, row_offsets), expected(inputs, len(a)))


wild = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF])


@settings(max_examples=60)
@given(st.lists(st.tuples(wild, wild), min_size=1, max_size=90), st.data())
def test_any_row_of_floats_with_any_thresholds(pairs: list[tuple[float, float]], data: st.DataObject):
    a, threshold = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    inputs = (*preactivations(a), threshold)
    max_active = data.draw(st.integers(1, len(pairs)))
    assert_same(threshold_encode(*inputs, max_active), expected(inputs, max_active))


@settings(max_examples=60)
@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 5), st.integers(1, 300), st.data())
def test_small_integers_in_wild_shapes_are_exact(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,), data.draw(st.sampled_from([(), (n,)])))
    inputs = tuple(torch.randint(-2, 3, s, generator=g).float() for s in sizes)
    max_active = data.draw(st.integers(1, n))
    assert_same(threshold_encode(*inputs, max_active), expected(inputs, max_active))
    assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, n))


@settings(max_examples=6)
@given(st.integers(0, 2**31), st.integers(0, 5), st.integers(1, 5), st.integers(1, 300), st.data())
def test_both_paths_give_the_same_bits_on_small_integers(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    g = torch.Generator().manual_seed(seed)
    sizes, device = ((rows, d), (n, d), (n,), (d,), (n,)), "cuda" if torch.cuda.is_available() else "cpu"
    inputs = tuple(torch.randint(-2, 3, size, generator=g).float().to(device) for size in sizes)
    max_active = data.draw(st.integers(1, n))
    with force_triton():
        assert_same(threshold_encode(*inputs, max_active), expected(inputs, max_active))
        assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, n))


def test_a_kept_bias_changes_nothing_and_is_checked(path: str):
    x, W, b, c, threshold = problem(4, 6, 40, torch.float16, path)
    inputs = tuple(t.float() if path == "cpu" else t for t in (x, W, b, c))  # a CPU prepares float32 alone
    prepared = prepare_encoder(*inputs[1:])
    for op, most in ((threshold_encode, (7,)), (threshold_encode_csr, ())):
        plain = op(*inputs, threshold, *most)
        assert all(map(torch.equal, op(*inputs, threshold, *most, prepared=prepared), plain))
        with pytest.raises(ValueError, match="prepare_encoder again"):
            op(inputs[0], inputs[1].clone(), *inputs[2:], threshold, *most, prepared=prepared)


def test_only_rows_with_nan_are_broken(path: str):
    inputs = problem(4, 6, 40, torch.float32, path)
    whole = threshold_encode(*inputs, 7)
    inputs[0][2, 3] = NAN
    values, indices, counts = threshold_encode(*inputs, 7)
    assert values[2].isnan().all()
    assert indices[2].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert counts[2] == 1
    kept = [0, 1, 3]
    for got, before in zip((values, indices, counts), whole, strict=True):
        assert torch.equal(got[kept], before[kept])
    values, indices, row_offsets = threshold_encode_csr(*inputs)
    assert row_offsets.diff().tolist() == counts.tolist()
    assert values.isnan().sum() == 1


# ------------------------------------------------------------------------------------------------ shapes and strides


def test_zero_rows(path: str):
    inputs = problem(0, 6, 40, torch.float32, path)
    values, indices, counts = threshold_encode(*inputs, 5)
    assert values.shape == indices.shape == (0, 5)
    assert counts.shape == (0,)
    values, indices, row_offsets = threshold_encode_csr(*inputs)
    assert values.shape == indices.shape == (0,)
    assert row_offsets.tolist() == [0]


def test_strided_inputs_give_what_contiguous_ones_do(path: str):
    x, W, b, p, t = problem(3, 8, 50, torch.float32, path)
    strided = (
        x.repeat_interleave(2, 1)[:, ::2],
        W.T.contiguous().T,
        b.repeat_interleave(3)[::3],
        p.repeat_interleave(2)[::2],
        t.repeat_interleave(2)[::2],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_same(threshold_encode(*strided, 20), expected((x, W, b, p, t), 20), 1e-5)
    assert_csr_same(threshold_encode_csr(*strided), expected((x, W, b, p, t), 50), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_thresholds_of_another_dtype_are_compared_in_that_of_the_sum(path: str, dtype: torch.dtype):
    *inputs, threshold = problem(3, 8, 50, torch.float32, path)
    threshold = threshold.half()  # the same number in all three dtypes
    assert_same(threshold_encode(*inputs, threshold.to(dtype), 20), expected((*inputs, threshold), 20), 1e-5)


def test_the_same_bits_every_time(path: str):
    inputs = problem(3, 9, 300, torch.float32, path)
    for first, second in zip(threshold_encode(*inputs, 40), threshold_encode(*inputs, 40), strict=True):
        assert torch.equal(first, second)


def test_the_scratch_does_not_grow_with_rows_even_where_all_is_active(one_thread):
    x, W, b, p, _ = problem(0, 2, 4000, torch.float32, "cpu")
    x = torch.zeros(3000, 2)  # 48 MB of pre-activations at once
    with torch.profiler.profile(profile_memory=True) as profile:
        threshold_encode(x, W, b.fill_(1.0), p.zero_(), torch.tensor(0.0), 4000)
    outputs = 3000 * 4000 * 4  # values and indices, each
    taken = {event.self_cpu_memory_usage for event in profile.events()}
    assert {size for size in taken if size > 26 << 20} == {outputs}


def test_a_csr_code_is_held_little_more_than_once(one_thread, monkeypatch):
    monkeypatch.setattr(threshold_cpu, "PIECE_ENTRIES", 1 << 18)
    rows, n = 1500, 2048
    inputs = (torch.zeros(rows, 2), torch.randn(n, 2), torch.ones(n), torch.zeros(2), torch.tensor(0.0))
    with torch.profiler.profile(profile_memory=True) as profile:
        values, indices, _ = threshold_encode_csr(*inputs)
    held, most, sizes = 0, 0, []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
            sizes.append(event.nbytes())
    assert len(values) == rows * n
    # Pieces are freed as they are joined: what the joined code has not been given yet takes no memory.
    assert sizes.count(-(4 << 18)) >= 2 * (len(values) >> 18)
    assert held == values.nbytes + indices.nbytes + 8 * (rows + 1)


MISTAKES = {
    "x": (lambda x, W, b, p, t: (x[None], W, b, p, t, 2), ValueError),
    "W_enc": (lambda x, W, b, p, t: (x, W[:, :-1], b, p, t, 2), ValueError),
    "W_enc must have": (lambda x, W, b, p, t: (x, W[:0], b[:0], p, t[:0], 2), ValueError),
    "b_enc": (lambda x, W, b, p, t: (x, W, b[:-1], p, t, 2), ValueError),
    "b_pre": (lambda x, W, b, p, t: (x, W, b, p.double(), t, 2), TypeError),
    "threshold must be a scalar": (lambda x, W, b, p, t: (x, W, b, p, t[:-1], 2), ValueError),
    "threshold must be floating": (lambda x, W, b, p, t: (x, W, b, p, t.int(), 2), TypeError),
    "max_active must": (lambda x, W, b, p, t: (x, W, b, p, t, 12), ValueError),
    "max_active": (lambda x, W, b, p, t: (x, W, b, p, t, 0), ValueError),
    "device": (lambda x, W, b, p, t: (x, W, b, p, t.to("meta"), 2), (ValueError, RuntimeError, NotImplementedError)),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    change, error = MISTAKES[named]
    arguments = change(*problem(3, 4, 11, torch.float32, "cpu"))
    with pytest.raises(error, match=named):
        threshold_encode(*arguments)
    if "max_active" not in named:
        with pytest.raises(error, match=named):
            threshold_encode_csr(*arguments[:-1])


# ------------------------------------------------------------------------------------------------------- gradients


def test_gradcheck_on_the_cpu_path():
    *inputs, threshold = problem(4, 3, 11, torch.float64, "cpu")
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: threshold_encode(*t, threshold, 6)[0], inputs)
    assert torch.autograd.gradcheck(lambda *t: threshold_encode_csr(*t, threshold)[0], inputs)


@pytest.mark.parametrize("entries", [1 << 20, 20])  # one block of rows in the CSR gradient, or several
@pytest.mark.parametrize("max_active", [33, 4])
def test_gradients_are_those_of_the_reference(path: str, max_active: int, entries: int, monkeypatch):
    monkeypatch.setitem(threshold_encode.__globals__, "PADDED_ENTRIES", entries)
    *inputs, threshold = problem(5, 7, 33, torch.float32, path, seed=3)
    inputs[0][3] = inputs[3]  # a row with few active latents
    weight = torch.linspace(-1, 1, 5 * max_active, device=path).view(5, max_active)
    got = [t.clone().requires_grad_() for t in inputs]
    values, indices, counts = threshold_encode(*got, threshold, max_active)
    assert not indices.requires_grad
    assert not counts.requires_grad
    (values * weight).sum().backward()
    want = [t.double().requires_grad_() for t in inputs]
    wanted = reference(*want, threshold.double(), max_active)
    (wanted[0] * weight).sum().backward()
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    if max_active == 33:
        got = [t.clone().requires_grad_() for t in inputs]
        slots = torch.arange(33, device=path)[None] < wanted[2][:, None]
        (threshold_encode_csr(*got, threshold)[0] * weight[slots]).sum().backward()
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)


def test_csr_gradients_of_half_precision_are_rounded_once(monkeypatch):
    *inputs, threshold = problem(9, 7, 33, torch.bfloat16, "cpu", seed=5)
    grads = []
    for entries in (1 << 20, 20):
        monkeypatch.setitem(threshold_encode.__globals__, "PADDED_ENTRIES", entries)
        got = [t.clone().requires_grad_() for t in inputs]
        threshold_encode_csr(*got, threshold)[0].square().sum().backward()
        grads.append([t.grad for t in got])
    for one_block, several in zip(*grads, strict=True):
        assert one_block.dtype == torch.bfloat16
        torch.testing.assert_close(one_block, several, rtol=1 / 128, atol=1e-6)  # one unit in the last place


def test_a_crowded_row_widens_one_block_of_the_csr_gradient_only(monkeypatch):
    monkeypatch.setitem(threshold_encode.__globals__, "PADDED_ENTRIES", 100)
    lengths = torch.tensor([2] * 30 + [90] + [0] * 30)
    row_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    blocks = threshold_encode.__globals__["_blocks_of_rows"](row_offsets)
    assert blocks == [(0, 30, 2), (30, 31, 90), (31, 61, 0)]


# ------------------------------------------------------------------------------------------------- citizen of torch


def test_the_padded_op_compiles_to_one_graph():
    *inputs, threshold = problem(6, 4, 50, torch.float32, "cpu")

    def step(x, W_enc, b_enc, b_pre):
        values, indices, counts = threshold_encode(x, W_enc, b_enc, b_pre, threshold, 20)
        return values.square().sum(), indices, counts

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        tensors = [t.clone().requires_grad_() for t in inputs]
        loss, indices, counts = run(*tensors)
        loss.backward()
        results.append((loss.detach(), indices, counts, *(t.grad for t in tensors)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def test_the_csr_form_is_a_sparse_code(path: str):
    inputs = problem(4, 6, 40, torch.float32, path)
    values, indices, row_offsets = threshold_encode_csr(*inputs)
    padded_values, padded_indices, _ = threshold_encode(*inputs, 40)
    dense = SparseCode(values, indices, 40, row_offsets).dense()
    assert torch.equal(dense, SparseCode(padded_values, padded_indices, 40).dense())
