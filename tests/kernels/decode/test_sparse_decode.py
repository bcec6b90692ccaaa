"""sparse_decode against its dense reference in fp64."""

import numpy as np
import pytest
import torch
from sparsefeat_kernels import force_triton, sparse_decode
from sparsefeat_kernels.decode import dense_code
from sparsefeat_kernels.decode import sparse_decode as decoding
from sparsefeat_kernels.decode.sparse_decode import reference
from sparsefeat_kernels.dispatch import INTERPRETED, TRITON_AVAILABLE
from torch import Tensor

from tests.kernels.launches import launches
from tests.kernels.pretended_gpu import on_gpu

kernels = pytest.mark.skipif(not (TRITON_AVAILABLE and INTERPRETED), reason="needs Triton's interpreter")

SHAPES = {"odd": (5, 3, 11, 7), "one": (1, 1, 1, 1), "wide": (2, 9, 21, 600), "deep": (3, 37, 40, 5)}  # rows k n d


def problem(rows: int, k: int, n: int, d: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    values[torch.rand(rows, k, generator=g) < 0.2] = 0  # padding
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int()
    W, b = torch.randn(n, d, generator=g).to(dtype), torch.randn(d, generator=g).to(dtype)
    return tuple(t.to(device) for t in (values, indices, W, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_sum_of_decoder_rows(path: str, shape: tuple[int, int, int, int], dtype: torch.dtype, request):
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    values, indices, W, b = problem(*shape, dtype, path)
    y = sparse_decode(values, indices, W, b)
    assert y.dtype == dtype
    expected = reference(values.double(), indices, W.double(), b.double())
    size = reference(values.double().abs(), indices, W.double().abs(), b.double().abs())
    rounding = {torch.float64: 2.0**-52, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
    sum_rounding = min(rounding[dtype], 2.0**-24)
    bound = (shape[1] + 2) * sum_rounding * size + rounding[dtype] * expected.abs() + 1e-7
    assert ((y.double() - expected).abs() <= bound).all()


def test_padding_never_reads_the_latent_it_points_at(path: str):
    values, indices, W, b = problem(3, 4, 9, 6, torch.float32, path)
    clean = sparse_decode(values, indices, W, b)
    indices[values == 0] = 8
    values[indices == 8] = 0
    clean = sparse_decode(values, indices, W, b)
    W[8] = torch.nan
    assert torch.equal(sparse_decode(values, indices, W, b), clean)


@pytest.mark.parametrize("smallest", [0.0, -0.0, 1e-30, -1.0, torch.nan])
def test_both_sides_of_what_is_decoded_whole(smallest: float):
    """Codes without a zero are one sum over bags; the others skip what their zeros point at, which holds NaN here."""
    g = torch.Generator().manual_seed(2)
    values, W_dec = torch.rand(6, 3, generator=g) + 0.5, torch.randn(20, 5, generator=g)
    indices = torch.randint(19, (6, 3), generator=g).int()
    values[4, 1] = smallest
    if smallest == 0:
        indices[4, 1], W_dec[19] = 19, torch.nan
    b_out = torch.randn(5, generator=g)
    wanted = torch.stack(
        [
            sum(v.double() * W_dec[i].double() for v, i in zip(*row, strict=True) if v != 0)
            for row in zip(values, indices, strict=True)
        ]
    )
    for some in (indices, indices.long()):
        found = sparse_decode(values, some, W_dec, b_out)
        torch.testing.assert_close(found.double(), wanted + b_out, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_indices_out_of_range_are_skipped_or_refused(path: str):
    values, indices, W, b = problem(3, 4, 9, 6, torch.float32, path)
    without = sparse_decode(values.index_fill(1, torch.tensor([1, 2], device=path), 0.0), indices, W, b)
    indices[:, 1], indices[:, 2] = 9, -1
    assert torch.equal(sparse_decode(values, indices, W, b), without)
    with pytest.raises(IndexError, match="indices must lie in 0"):
        sparse_decode(values, indices, W, b, validate=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bad", [9, -1, 2**31 - 1, -(2**31), 2**40, -(2**62)])
def test_no_index_out_of_range_is_read_on_a_cpu(dtype: torch.dtype, transposed: bool, bad: int):
    values, indices, W, b = problem(300, 4, 9, 33, dtype, "cpu")
    W = W.T.contiguous().T if transposed else W
    without = sparse_decode(values.index_fill(0, torch.tensor([211]), 0.0), indices, W, b)
    indices = indices.long() if abs(bad) > 2**31 else indices
    indices[211] = bad
    assert torch.equal(sparse_decode(values, indices, W, b), without)


def test_no_rows_no_entries_and_no_values(path: str):
    values, indices, W, b = problem(3, 4, 9, 6, torch.float32, path)
    assert sparse_decode(values[:0], indices[:0], W, b).shape == (0, 6)
    assert torch.equal(sparse_decode(values[:, :0], indices[:, :0], W, b), b.expand(3, 6))
    assert torch.equal(sparse_decode(values * 0, indices, W, b), b.expand(3, 6))


def test_strides_are_free(path: str):
    values, indices, W, b = problem(3, 4, 9, 6, torch.float32, path)
    strided = values.T.contiguous().T, indices.repeat_interleave(2, 1)[:, ::2], W.T.contiguous().T, b.repeat(2)[:6]
    torch.testing.assert_close(sparse_decode(*strided), sparse_decode(values, indices, W, b), rtol=1e-6, atol=1e-6)


def test_a_transposed_dictionary_of_more_than_2_to_the_31_elements(path: str):
    """Only the pages that hold the few values are ever touched."""
    values, indices, W, b = problem(3, 4, 9, 5, torch.float16, path)
    stride = 2**29 + 8  # four times that is more than 2**31
    if path == "cpu":
        memory = torch.from_numpy(np.empty(4 * stride + 9, np.float16))
    else:
        memory = torch.empty(4 * stride + 9, dtype=torch.float16, device=path)
    far = memory.as_strided((9, 5), (1, stride)).copy_(W)
    assert torch.equal(sparse_decode(values, indices, far, b), sparse_decode(values, indices, W, b))
    got = [values.clone().requires_grad_() for _ in range(2)]
    for tensor, weights in zip(got, (far, W), strict=True):
        sparse_decode(tensor, indices, weights, b).float().square().sum().backward()
    torch.testing.assert_close(got[0].grad, got[1].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_those_of_the_reference(path: str, dtype: torch.dtype):
    values, indices, W, b = problem(5, 3, 11, 7, dtype, path)
    got = [t.clone().requires_grad_() for t in (values, W, b)]
    weight = torch.linspace(-1, 1, 35, device=path).view(5, 7)
    (sparse_decode(got[0], indices, got[1], got[2]).float() * weight).sum().backward()
    expected = [t.double().requires_grad_() for t in (values, W, b)]
    (reference(expected[0], indices, expected[1], expected[2]) * weight.to(dtype)).sum().backward()
    expected[0].grad[values == 0] = 0  # padding learns nothing
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def test_gradcheck_on_the_cpu_path():
    values, indices, W, b = problem(4, 3, 8, 5, torch.float64, "cpu")
    values = values.abs() + 0.1
    inputs = [t.requires_grad_() for t in (values, W, b)]
    assert torch.autograd.gradcheck(lambda v, w, c: sparse_decode(v, indices, w, c), inputs)


MISTAKES = {
    "values and indices": lambda v, i, W, b: (v[:, :-1], i, W, b),
    "values must be floating": lambda v, i, W, b: (v.int(), i, W, b),
    "indices must be int32": lambda v, i, W, b: (v, i.float(), W, b),
    "W_dec must be": lambda v, i, W, b: (v, i, W[0], b),
    "b_out must have shape": lambda v, i, W, b: (v, i, W, b[:-1]),
    "b_out must have W_dec's dtype": lambda v, i, W, b: (v, i, W, b.half()),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    with pytest.raises((ValueError, TypeError), match=named):
        sparse_decode(*MISTAKES[named](*problem(3, 2, 5, 4, torch.float32, "cpu")))


def test_more_entries_than_latents_have_gradients():
    values = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    indices, W = torch.tensor([[0, 1, 1]]), torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    sparse_decode(values, indices, W, torch.zeros(2)).sum().backward()
    assert torch.equal(values.grad, torch.tensor([[3.0, 8.0, 8.0]]))


# ------------------------------------------------------------------------------- by a dense product, as a GPU may do it


def exact(values: Tensor, indices: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the entries that count, and those of their absolute terms, in fp64."""
    counts = (values != 0) & (indices >= 0) & (indices < len(W))
    clean, at = torch.where(counts, values, 0).double(), torch.where(counts, indices, 0).long()
    terms = torch.where(counts[..., None], clean[..., None] * W.double()[at], 0)
    return terms.sum(1) + b.double(), terms.abs().sum(1) + b.double().abs()


@kernels
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "shape", [(5, 3, 11, 7), (1, 1, 1, 1), (70, 40, 50, 20), (3, 1100, 1200, 5)], ids=str
)  # of 1,024 entries at a time, and of 64 rows
def test_the_product_of_the_dense_code_gives_the_sums_of_the_entries(shape, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(decoding, "DENSE_BYTES", 1)
    monkeypatch.setattr(decoding, "dense_pays", lambda rows, k, W: True)
    values, indices, W, b = problem(*shape, torch.float32, "cpu")
    values.requires_grad_()
    grad = torch.randn(shape[0], shape[3], generator=torch.Generator().manual_seed(9))
    taken = set()
    for name in ("dense_code", "picked"):
        original = getattr(decoding, name)
        monkeypatch.setattr(decoding, name, lambda *args, name=name, run=original: (taken.add(name), run(*args))[1])
    with force_triton():
        y = sparse_decode(values, indices, W, b)
        (found,) = torch.autograd.grad(y, values, grad)
    assert taken == {"dense_code", "picked"}
    wanted, size = exact(values.detach(), indices, W, b)
    assert ((y.double() - wanted).abs() <= (shape[1] + 2) * 2.0**-24 * size + 1e-30).all()
    terms = grad.double()[:, None] * W.double()[indices.long()]
    wanted, size = (torch.where(values != 0, of.sum(-1), 0) for of in (terms, terms.abs()))
    assert ((found.double() - wanted).abs() <= (shape[3] + 2) * 2.0**-24 * size).all()


@kernels
@pytest.mark.parametrize("k", [40, 1500])
def test_entries_of_one_latent_add_up_in_the_dense_code_and_others_are_skipped(k):
    g = torch.Generator().manual_seed(k)
    values, indices = torch.randn(3, k, generator=g), torch.randint(2000, (3, k), generator=g)
    indices[1] = torch.randint(7, (k,), generator=g)  # of a row that has nothing but these
    indices[2] = torch.randperm(2000, generator=g)[:k]  # and of one without
    indices[2, -1] = indices[2, 0]  # but for two that are far apart
    values[:, 5], indices[0, 7], indices[0, 9] = 0, -1, 2**40
    W, b = torch.randn(2000, 6, generator=g), torch.zeros(6)
    with force_triton():
        found = [decoding.sparse_decode_dense(values, indices, W, b) for _ in range(2)]
    wanted, size = exact(values, indices, W, b)
    assert torch.equal(*found)
    assert ((found[0].double() - wanted).abs() <= (k + 2) * 2.0**-24 * size).all()


@kernels
def test_what_no_entry_of_a_row_points_at_does_not_reach_the_product():
    """Nor does what overflows in it alone: rows whose sums are not finite are gathered."""
    values, indices, W, b = problem(6, 9, 40, 600, torch.float32, "cpu", seed=3)
    clean = [40 - 1, 38, 37]
    indices = torch.where(indices >= 37, indices - 37, indices)
    W[39], W[38, 550], W[37, 2] = torch.nan, torch.inf, -torch.inf
    indices[values == 0] = 39  # padding points at NaN
    indices[1, 0], values[1, 0] = clean[0], 2.0
    indices[2, 3], values[2, 3] = clean[1], -1.0
    values[3, 4] = torch.nan
    values[4, :2], indices[4, :2], W[0] = torch.tensor([3e38, -3e38]), 0, 1.0
    grad = torch.ones(6, 600)
    with force_triton():
        y = decoding.sparse_decode_dense(values, indices, W, b)
        dots = decoding.grad_values_dense(grad, values, indices, W)
        torch.testing.assert_close(dots, decoding.grad_values_cpu(grad, values, indices, W), equal_nan=True)
    assert y[1].isnan().all()
    assert y[3].isnan().all()
    assert y[2].isinf().nonzero().flatten().tolist() == [550]
    wanted, size = exact(values, indices, W, b)
    finite = wanted.isfinite()
    assert (finite == y.isfinite()).all()
    assert ((y.double() - wanted).abs() <= 11 * 2.0**-24 * size)[finite].all()


@pytest.mark.parametrize(
    ("rows", "d", "n", "k", "pays"),
    [
        (4096, 1280, 5120, 160, True),  # sdxl-unbox, TIDE
        (4096, 1152, 18432, 922, True),
        (65536, 1280, 5120, 160, True),
        (4096, 1280, 20480, 32, False),  # SAeUron, and others of few of many
        (4096, 768, 32768, 64, False),
        (4096, 3072, 65536, 64, False),
        (4096, 768, 3072, 32, False),
        (512, 1280, 5120, 160, False),  # three launches last longer
        (0, 1280, 5120, 160, False),
        (4096, 1280, 5120, 0, False),
    ],
)
def test_the_dense_product_is_for_many_entries_of_few_latents(rows, d, n, k, pays, monkeypatch):
    monkeypatch.setattr(decoding, "sums_wider", lambda dtype, device: True)
    W = on_gpu(torch.empty(n, d, dtype=torch.bfloat16, device="meta"))
    assert decoding.dense_pays(rows, k, W) is pays
    assert decoding.dense_pays(rows, k, W.T.contiguous().T if n < 20000 else W) is pays
    for dtype in (torch.float32, torch.float16, torch.float64):
        assert not decoding.dense_pays(rows, k, on_gpu(torch.empty(n, d, dtype=dtype, device="meta")))
    assert not decoding.dense_pays(rows, k, torch.empty(n, d, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(decoding, "sums_wider", lambda dtype, device: False)  # a product there would be of fp32
    assert not decoding.dense_pays(rows, k, W)


@kernels
@pytest.mark.parametrize(("d", "n", "k", "chunks"), [(1280, 5120, 160, 2), (1152, 18432, 922, 6)])
def test_the_dense_product_has_three_launches_a_chunk_and_its_scratch_a_bound(d, n, k, chunks, monkeypatch):
    W, b = torch.empty(n, d, dtype=torch.bfloat16, device="meta"), torch.empty(d, dtype=torch.bfloat16, device="meta")
    code = torch.empty(4096, k, device="meta"), torch.empty(4096, k, dtype=torch.int32, device="meta")
    held = []

    def product(z: Tensor, W: Tensor) -> Tensor:
        sums = z.new_zeros(len(z), W.shape[1], dtype=torch.float32)
        held.append(z.untyped_storage().nbytes() + sums.nbytes)
        return sums

    monkeypatch.setattr(decoding, "wide_product", product)
    with force_triton(), launches(monkeypatch, decoding, dense_code) as launched:
        decoding.sparse_decode_dense(*code, W, b)
    assert launched == ["_sparse_decode_dense_kernel", "new_zeros", "_sparse_decode_sum_kernel"] * chunks
    assert max(held) <= 64 << 20
