"""auxk_decode and auxk_weight_gradient: the dead latents' code, sparse or dense, is decoded the same."""

import pytest
import torch
from sparsefeat_kernels import auxk_decode, auxk_weight_gradient, implementation
from sparsefeat_kernels.decode.auxk_decode import dense_in, reference
from sparsefeat_kernels.gradient.weight_gradient import reference as gradient_reference

K_AUX = {"dense": 6, "sparse": 2}  # of 23 dead latents: a dense product pays from 3 on


def case(k_aux, rows=11, d=13, n=61, dtype=torch.float32):
    g = torch.Generator().manual_seed(k_aux)
    dead = torch.randperm(n, generator=g)[:23].sort().values
    values, aux = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (3, k_aux))
    indices = torch.randint(n, (rows, 3), generator=g).int()  # dead latents among them: they may fire again
    picked = torch.stack([torch.randperm(23, generator=g)[:k_aux] for _ in range(rows)])
    W, b, x = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((n, d), (d,), (rows, d)))
    aux[0, 0] = 0
    values, aux, W, b, x = (t.to(dtype) for t in (values, aux, W, b, x))
    return values, indices, aux, dead[picked].int(), dead, W, b, x


def on(device, tensors):
    return [t.to(device) for t in tensors]


@pytest.mark.parametrize("k_aux", K_AUX.values(), ids=K_AUX)
@pytest.mark.parametrize("chunked", [False, True])
def test_both_reconstructions_are_those_of_the_reference(path, k_aux, chunked, monkeypatch):
    if chunked:
        monkeypatch.setitem(dense_in.__globals__, "CODE_BYTES", 4 * 23 * 4)
        monkeypatch.setitem(dense_in.__globals__, "TILE_BYTES", 4 * 13 * 7)
    *inputs, _ = case(k_aux)
    if implementation("sparse_decode", inputs[5].to(path)) == "torch":
        assert dense_in(inputs[5], inputs[4], k_aux) == (k_aux == K_AUX["dense"])
    expected = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    for got, exact in zip(auxk_decode(*on(path, inputs)), expected, strict=True):
        torch.testing.assert_close(got.double().cpu(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k_aux", K_AUX.values(), ids=K_AUX)
@pytest.mark.parametrize("chunked", [False, True])
def test_gradients_are_those_of_the_formulas(k_aux, chunked, monkeypatch):
    """Against autograd of the dense computation in fp64; entries of value 0 are padding and have no gradient."""
    if chunked:
        monkeypatch.setitem(dense_in.__globals__, "CODE_BYTES", 8 * 23 * 4)
        monkeypatch.setitem(dense_in.__globals__, "TILE_BYTES", 8 * 13 * 7)
    values, indices, aux, aux_indices, dead, W, b, x = case(k_aux, dtype=torch.float64)
    learned = [t.requires_grad_() for t in (values, aux, W, b)]
    results = []
    for decode in (auxk_decode, reference):
        y, guess = decode(values, indices, aux, aux_indices, dead, W, b)
        results.append(torch.autograd.grad(((y - x) ** 2).sum() + (guess * x).sum(), learned))
    results[1][1][aux == 0] = 0
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("k_aux", K_AUX.values(), ids=K_AUX)
@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("rows", [11, 150])  # the second: one code of twice the rows is larger than the gradient
def test_the_weight_gradient_is_the_sum_of_both_codes_products(path, k_aux, own_rows, rows):
    n = 61
    coefficients, indices, aux, aux_indices, dead, _, shift, x = case(k_aux, rows)
    aux_x = 2 * x + 1 if own_rows else None
    inputs = (coefficients, indices, x, aux, aux_indices, aux_x, dead, shift)
    moved = [None if t is None else t.to(path) for t in inputs]
    found = auxk_weight_gradient(*moved, n)
    assert all(torch.equal(a, b) for a, b in zip(found, auxk_weight_gradient(*moved, n), strict=True))
    parts = ((coefficients, indices, x), (aux, aux_indices, x if aux_x is None else aux_x))
    sums = [gradient_reference(c.double(), i, rows.double(), shift.double(), n) for c, i, rows in parts]
    for got, first, second in zip(found, *sums, strict=True):
        torch.testing.assert_close(got.double().cpu(), first + second, rtol=1e-5, atol=1e-5)


def test_nan_and_infinity_reach_only_the_rows_whose_code_they_are_in():
    """Though the dense product multiplies them with the zeros of all other rows."""
    values, indices, aux, aux_indices, dead, W, b, x = case(K_AUX["dense"])
    latent = int(aux_indices[3, 1])
    W[latent] = torch.inf
    indices[indices == latent] = int(aux_indices[3, 2])
    _, guess = auxk_decode(values, indices, aux, aux_indices, dead, W, b)
    uses = ((aux_indices == latent) & (aux != 0)).any(1)
    assert torch.equal(guess.isfinite().all(1), ~uses)
    x[4, 0] = torch.nan
    weight, _ = auxk_weight_gradient(values, indices, x, aux, aux_indices, None, dead, b, 61)
    touched = torch.zeros(61, dtype=torch.bool)
    touched[indices[4].long()] = touched[aux_indices[4].long()] = True
    assert torch.equal(weight.isnan().any(1), touched)


def test_an_entry_outside_the_dead_latents_is_still_decoded():
    *inputs, _ = case(K_AUX["dense"])
    inputs[3][5, 2] = next(i for i in range(61) if i not in inputs[4])
    expected = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    torch.testing.assert_close(auxk_decode(*inputs)[1].double(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_weights_keep_the_sum_in_fp32(dtype):
    values, indices, aux, aux_indices, dead, W, b, _ = case(K_AUX["dense"])
    inputs = values, indices, aux, aux_indices, dead, W.to(dtype), b.to(dtype)
    expected = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    for got, exact in zip(auxk_decode(*inputs), expected, strict=True):
        assert torch.equal(got, exact.to(dtype)) or (got - exact).abs().max() < 2e-2 * exact.abs().max()


def test_no_rows():
    *inputs, _ = case(K_AUX["dense"])
    y, guess = auxk_decode(*(t[:0] for t in inputs[:4]), *inputs[4:])
    assert y.shape == guess.shape == (0, 13)


def test_errors_name_the_argument():
    *inputs, _ = case(2)
    with pytest.raises(TypeError, match=r"dead must be int64 \[n_dead\], got torch\.bool"):
        auxk_decode(*inputs[:4], torch.ones(61, dtype=torch.bool), *inputs[5:])
    with pytest.raises(ValueError, match=r"aux_values and aux_indices must both be \[11, k_aux\]"):
        auxk_decode(*inputs[:2], inputs[2][:3], inputs[3][:3], *inputs[4:])
    with pytest.raises(TypeError, match=r"aux_indices must be int32 or int64, got torch.float32"):
        auxk_decode(*inputs[:3], inputs[3].float(), *inputs[4:])
