"""The dead latents' code as a dense one on a GPU: the sums of the sparse one, in the precision that is promised, in few launches."""

import pytest
import torch
from sparsefeat_kernels import auxk_decode, auxk_weight_gradient, force_triton
from sparsefeat_kernels.decode import auxk_dense
from sparsefeat_kernels.decode.auxk_decode import reference
from sparsefeat_kernels.dispatch import INTERPRETED, TRITON_AVAILABLE
from sparsefeat_kernels.gradient import csr
from sparsefeat_kernels.gradient import weight_gradient as gradient
from torch import Tensor

from tests.kernels.launches import launches
from tests.kernels.pretended_gpu import back, on_gpu, pretended

ops = torch.ops.sparsefeat
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24, torch.float64: 2.0**-52}
# Of the values that are multiplied.
TAKEN = {torch.bfloat16: 2.0**-18, torch.float32: 0, torch.float64: 0}
kernels = pytest.mark.skipif(not (TRITON_AVAILABLE and INTERPRETED), reason="needs Triton's interpreter")


def case(dtype=torch.float32, rows=23, d=13, n=150, k_aux=9, n_dead=37) -> list[Tensor]:
    """values, indices, aux_values, aux_indices, dead, W_dec, b_out, x. The code has dead latents too, the auxiliary one
    padding that points anywhere."""
    g = torch.Generator().manual_seed(n_dead)
    dead = torch.randperm(n, generator=g)[:n_dead].sort().values
    values, aux = (torch.randn(rows, k, generator=g, dtype=torch.float64) for k in (3, k_aux))
    indices = torch.randint(n, (rows, 3), generator=g).int()
    picked = torch.stack([torch.randperm(n_dead, generator=g)[:k_aux] for _ in range(rows)])
    W, b, x = (torch.randn(size, generator=g, dtype=torch.float64).to(dtype) for size in ((n, d), (d,), (rows, d)))
    aux_indices = dead[picked].int()
    aux[::3, 1], aux_indices[::3, 1] = 0, next(i for i in range(n) if i not in dead)
    of_code = torch.float64 if dtype == torch.float64 else torch.float32
    return [values.to(of_code), indices, aux.to(of_code), aux_indices, dead, W, b, x]


def dense(values: Tensor, indices: Tensor, n: int) -> Tensor:
    return torch.zeros(len(values), n, dtype=torch.float64).scatter_add_(1, indices.long(), values.double())


def within(got: Tensor, exact: Tensor, size: Tensor, terms: int, dtype: torch.dtype, rounded: int = 1) -> None:
    """size: the sum of the absolute terms; rounded: how often the result was rounded."""
    of_sum = (terms + 2) * min(ROUNDING[dtype], 2.0**-24) + TAKEN[dtype]
    bound = of_sum * size + rounded * ROUNDING[dtype] * exact.abs() + 1e-30
    assert ((back(got).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_products_have_the_precision_of_sparse_sums_and_wait_for_nothing(dtype, chunked, monkeypatch):
    if chunked:
        monkeypatch.setattr(auxk_dense, "ROWS_BYTES", 1)
    values, indices, aux, aux_indices, dead, W, b, x = case(dtype)
    z, n = dense(aux, aux_indices, len(W)), len(W)
    with pretended() as waits, force_triton(False):
        inputs = [on_gpu(t) for t in (values, indices, aux, aux_indices, dead, W, b)]
        assert auxk_dense.dense_pays(inputs[5], inputs[4], aux.shape[1])
        _, guess = ops.auxk_decode(*inputs)
        grad = ops.auxk_decode_grad_values(on_gpu(x), *inputs[2:6])
        weight, bias = on_gpu(torch.zeros(n, 13, dtype=dtype)), on_gpu(torch.zeros(n, dtype=aux.dtype))
        auxk_dense.add_dense_weight_gradient(weight, bias, *inputs[2:4], on_gpu(x), inputs[4], on_gpu(b))
    assert waits == []
    within(guess, z @ W.double(), z.abs() @ W.double().abs(), 9, dtype)
    products = x.double()[:, None] * W.double()[aux_indices.long()]
    used = aux != 0
    within(
        grad,
        torch.where(used, products.sum(-1), 0),
        products.abs().sum(-1),
        13,
        torch.float32 if dtype != torch.float64 else dtype,
    )
    centred = x.double() - b.double()
    # Both factors are taken so.
    within(weight, z.T @ centred, 3 * z.abs().T @ (x.double().abs() + b.double().abs()), 23, dtype)
    within(bias, z.sum(0), (1 + TAKEN[dtype] / 2.0**-24) * z.abs().sum(0), 23, aux.dtype)


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_codes_gradients_are_added(dtype, own_rows):
    values, indices, aux, aux_indices, dead, W, b, x = case(dtype)
    aux_x = x * 2 if own_rows else None
    with pretended(), force_triton(False):
        given = [t if t is None else on_gpu(t) for t in (values, indices, x, aux, aux_indices, aux_x, dead, b)]
        weight, bias = ops.auxk_weight_gradient(*given, len(W))
    z, z_aux = dense(values, indices, len(W)), dense(aux, aux_indices, len(W))
    parts = [(z, x.double()), (z_aux, 2 * x.double() if own_rows else x.double())]
    exact = sum(code.T @ (rows - b.double()) for code, rows in parts)
    size = sum(3 * code.abs().T @ (rows.abs() + b.double().abs()) for code, rows in parts)
    first = (z.T @ (x.double() - b.double())).abs()  # rounded before the other is added
    within(weight, exact, size + first * ROUNDING[dtype] / 2.0**-24 / 25, 23, dtype)
    torch.testing.assert_close(back(bias).double(), z.sum(0) + z_aux.sum(0), rtol=1e-4, atol=1e-4)


@kernels
@pytest.mark.parametrize("k_aux", [9, 70])  # of 32 at a time
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_entries_of_one_place_add_up_wherever_they_stand(k_aux, dtype):
    """The interpreter cuts bf16 off where a GPU rounds: each part is then within 2^-7 of what it is of."""
    g = torch.Generator().manual_seed(k_aux)
    values, dead = torch.randn(5, k_aux, generator=g), torch.tensor([4, 9, 2, 61, 30])
    indices = dead[torch.randint(5, (5, k_aux), generator=g)]
    values[:, 3] = 0
    indices[:, 3], indices[2, 5], indices[4, 6] = 7, -1, 62  # padding of no dead latent; outside
    places = auxk_dense._places(dead, 62)
    with force_triton():
        z = auxk_dense._dense(values, indices, places, 5, torch.empty(0, dtype=dtype))
    inside = (indices >= 0) & (indices < 62)
    clean, at = torch.where(inside, values, 0), torch.where(inside, indices, 0)
    exact, size = (dense(t, at, 62)[:, dead] for t in (clean, clean.abs()))
    assert z.shape == (2 if dtype == torch.bfloat16 else 1, 5, 16)
    assert (
        (z.double().sum(0)[:, :5] - exact).abs() <= size * (2.0**-13 if dtype == torch.bfloat16 else k_aux * 2.0**-24)
    ).all()
    assert (z[:, :, 5:] == 0).all()


@pytest.mark.parametrize("by", ["torch", pytest.param("kernels", marks=kernels)])
def test_an_entry_of_no_dead_latent_is_not_lost_in_silence(by):
    values, indices, aux, aux_indices, dead, W, b, x = case()
    aux_indices[5, 2] = next(i for i in range(150) if i not in dead)
    move = on_gpu if by == "torch" else lambda t: t
    with pretended(), force_triton(by == "kernels"):
        inputs = [move(t) for t in (values, indices, aux, aux_indices, dead, W, b)]
        guess = back(ops.auxk_decode(*inputs)[1])
        grad = back(ops.auxk_decode_grad_values(move(x), *inputs[2:6]))
        weight, bias = ops.auxk_weight_gradient(*inputs[:2], move(x), *inputs[2:4], None, inputs[4], move(b), 150)
    assert guess.isnan().all(1).nonzero().tolist() == [[5]]
    assert grad.isnan().nonzero().tolist() == [[5, 2]]
    assert back(weight)[dead].isnan().all()
    assert back(bias)[dead].isnan().all()


@pytest.mark.parametrize("by", ["torch", pytest.param("kernels", marks=kernels)])
def test_nan_never_becomes_a_number(by):
    """It may reach other dead latents and rows, and always reaches its own."""
    values, indices, aux, aux_indices, dead, W, b, x = case()
    x[4, 2] = torch.nan
    W[aux_indices[7, 4].long(), 1] = torch.inf
    move = on_gpu if by == "torch" else lambda t: t
    with pretended(), force_triton(by == "kernels"):
        inputs = [move(t) for t in (values, indices, aux, aux_indices, dead, W, b)]
        guess = back(ops.auxk_decode(*inputs)[1])
        weight = back(ops.auxk_weight_gradient(*inputs[:2], move(x), *inputs[2:4], None, inputs[4], move(b), 150)[0])
    assert not guess[((aux_indices == aux_indices[7, 4]) & (aux != 0)).any(1), 1].isfinite().any()
    assert weight[aux_indices[4][aux[4] != 0].long(), 2].isnan().all()


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.bfloat16, 180), (torch.float32, 72), (torch.float64, 72), (torch.float16, 0)]
)
def test_the_way_is_dense_up_to_so_many_dead_latents(dtype, most, monkeypatch):
    W = on_gpu(torch.zeros(2, 3, dtype=dtype))
    paying = [n for n in range(200) if auxk_dense.dense_pays(W, torch.zeros(n), 9)]
    assert paying == list(range(1, most + 1))
    assert not auxk_dense.dense_pays(torch.zeros(2, 3, dtype=dtype), torch.zeros(9), 9)


@kernels
def test_a_step_has_few_launches(monkeypatch):
    """At 4,096 rows, of which products take 2,048 at a time."""
    sizes = ((20480, 1280), (4096, 1280), (1280,))
    W, x, b = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    aux = torch.empty(4096, 640, device="meta"), torch.empty(4096, 640, dtype=torch.int32, device="meta")
    dead = torch.empty(2560, dtype=torch.int64, device="meta")
    one_launch = lambda a, b: a.new_zeros(len(a), b.shape[1], dtype=torch.float32)  # noqa: E731
    monkeypatch.setattr(auxk_dense, "wide_product", one_launch)
    with force_triton():
        with launches(monkeypatch, auxk_dense) as launched:
            auxk_dense.dense_decode(*aux, dead, W)
        assert (launched.count("_auxk_dense_kernel"), len(launched)) == (2, 17), launched
        with launches(monkeypatch, auxk_dense) as launched:
            auxk_dense.dense_grad_values(x, *aux, dead, W)
        assert (launched.count("_auxk_picked_kernel"), len(launched)) == (1, 7), launched
        weight = torch.empty_like(W), torch.empty(20480, device="meta")
        with launches(monkeypatch, auxk_dense, csr, gradient) as launched:
            auxk_dense.add_dense_weight_gradient(*weight, *aux, x, dead, b)
        assert (launched.count("_auxk_dense_kernel"), len(launched)) == (2, 46), launched
    assert not any("sort" in name for name in launched)


@kernels
@pytest.mark.parametrize("rows", [23, 5])
def test_kernels_give_the_answers_of_the_reference(rows, monkeypatch):
    monkeypatch.setattr(auxk_dense, "ROWS_BYTES", 1)
    values, indices, aux, aux_indices, dead, W, b, x = case(rows=rows)
    inputs = values, indices, aux, aux_indices, dead, W, b
    exact = reference(*(t.double() if t.is_floating_point() else t for t in inputs))
    with force_triton():
        assert auxk_dense.dense_pays(W, dead, aux.shape[1])
        for got, wanted in zip(auxk_decode(*inputs), exact, strict=True):
            torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
        grad = ops.auxk_decode_grad_values(x, aux, aux_indices, dead, W)
        weight, bias = auxk_weight_gradient(values, indices, x, aux, aux_indices, None, dead, b, len(W))
    dots = (x.double()[:, None] * W.double()[aux_indices.long()]).sum(-1)
    torch.testing.assert_close(grad.double(), torch.where(aux != 0, dots, 0), rtol=1e-5, atol=1e-5)
    z = dense(values, indices, len(W)) + dense(aux, aux_indices, len(W))
    torch.testing.assert_close(weight.double(), z.T @ (x.double() - b.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(bias.double(), z.sum(0), rtol=1e-5, atol=1e-5)
