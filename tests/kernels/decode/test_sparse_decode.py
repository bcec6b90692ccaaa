"""sparse_decode against its dense reference in fp64."""

import numpy as np
import pytest
import torch
from sparsefeat_kernels import sparse_decode
from sparsefeat_kernels.decode.sparse_decode import reference
from torch import Tensor

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
