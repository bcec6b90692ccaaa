"""auxk_encode: two encodes from one product."""

import pytest
import torch
from sparsefeat_kernels import auxk_encode, bf16_products, prepare_encoder, sparse_decode, topk_encode
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode import auxk, cpu, product
from sparsefeat_kernels.encode import topk as encode_topk
from sparsefeat_kernels.encode.auxk import reference
from sparsefeat_kernels.encode.gpu import groups, select, stored, topk


def case(device: str, rows=7, d=19, n=53, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = (torch.randn(rows, d, generator=g), torch.randn(n, d, generator=g) / d**0.5)
    biases = 0.1 * torch.randn(n, generator=g), torch.randn(d, generator=g)
    dead = torch.randperm(n, generator=g)[: n // 3].sort().values
    return *(t.to(device, dtype) for t in (*tensors, *biases)), dead.to(device)


@pytest.mark.parametrize("selection", ["relu", "signed", "raw"])
@pytest.mark.parametrize("k_aux", [1, 5, 17])
def test_both_codes_are_those_of_the_reference(path, selection, k_aux):
    x, W, b, c, dead = case(path)
    found = auxk_encode(x, W, b, c, 4, dead, k_aux, selection)
    expected = reference(*(t.double() for t in (x, W, b, c)), 4, dead, k_aux, selection)
    for got, exact in zip(found, expected, strict=True):
        if got.dtype == torch.int32:
            assert torch.equal(got, exact)
        else:
            torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=1e-5)
    assert torch.isin(found[3].long(), dead).all()


def test_the_first_code_is_that_of_topk_encode(path):
    x, W, b, c, dead = case(path)
    values, indices = topk_encode(x, W, b, c, 6)
    found = auxk_encode(x, W, b, c, 6, dead, 3)
    assert torch.equal(found[1], indices)
    torch.testing.assert_close(found[0], values, atol=1e-5, rtol=1e-5)  # products split over threads add up otherwise


def test_any_number_of_rows_in_small_chunks(monkeypatch):
    monkeypatch.setattr(cpu, "PREACTIVATION_BYTES", 4000)
    monkeypatch.setattr(auxk, "SELECTION_BYTES", 500)
    for rows in (0, 1, 101):
        x, W, b, c, dead = case("cpu", rows=rows)
        found = auxk_encode(x, W, b, c, 4, dead, 5)
        expected = reference(*(t.double() for t in (x, W, b, c)), 4, dead, 5)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[3], expected[3])


@pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("k", "stored_is_proven", "selections"),
    [(4, True, {"select", "stored"}), (4, False, {"select"}), (900, True, {"stored"}), (9000, True, set())],
)
def test_the_host_never_waits_for_the_device(k, stored_is_proven, selections, monkeypatch):
    """On tensors that have no data, any value that was asked for would be an error."""
    launched = []

    class Recorded:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(self.name)

    for module in (groups, select, stored, product):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(name))
    sizes = ((300, 64), (20480, 64), (20480,), (64,))
    inputs = [torch.empty(size, dtype=torch.float16, device="meta") for size in sizes]
    dead = torch.empty(5000, dtype=torch.int64, device="meta")
    # On a machine with a GPU too, where nothing is interpreted.
    by_name = {"topk_encode": "triton", "topk_encode_stored": "triton" if stored_is_proven else "torch"}
    monkeypatch.setattr(topk, "implementation", lambda op, x: by_name[op])
    monkeypatch.setattr(
        auxk.ops, "topk_encode", encode_topk._topk_encode
    )  # the op itself makes nothing of such tensors
    found = auxk._auxk_encode(*inputs, k, dead, 320, "relu", None, None)
    assert [tuple(t.shape) for t in found] == [(300, k)] * 2 + [(300, 320)] * 2
    assert {name.split("_")[3] for name in launched if name.startswith("_topk")} - {"product", "repair"} == selections


@pytest.mark.parametrize("selection", ["relu", "signed"])
def test_no_gradient_goes_through_an_entry_of_value_0_and_none_is_lost_through_nan(selection):
    values, grad = torch.tensor([[0.0, -0.0, 2.0, torch.nan]]), torch.tensor([[torch.inf, 1.0, 2.0, 3.0]])
    assert encode_topk.through(values, grad, selection).tolist() == [[0, 0, 2, 3]]
    assert encode_topk.through(values, None, selection).tolist() == [[0] * 4]


def test_gradients_are_those_of_the_formulas():
    """Against autograd of the dense computation in fp64: the auxiliary code teaches W_enc and b_enc and nothing else."""
    x, W, b, c, dead = (t.requires_grad_() if t.is_floating_point() else t for t in case("cpu", dtype=torch.float64))
    values, _, aux_values, _ = auxk_encode(x, W, b, c, 4, dead, 5)
    g = torch.Generator().manual_seed(3)
    of_code, of_aux = (torch.randn(v.shape, generator=g, dtype=torch.float64) for v in (values, aux_values))
    found = torch.autograd.grad((values * of_code).sum() + (aux_values * of_aux).sum(), (x, W, b, c))
    first = reference(x, W, b, c, 4, dead, 5)
    second = reference(x.detach(), W, b, c.detach(), 4, dead, 5)
    expected = torch.autograd.grad((first[0] * of_code).sum() + (second[2] * of_aux).sum(), (x, W, b, c))
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact)


def test_a_row_with_nan_is_nan_in_both_codes(path):
    x, W, b, c, dead = case(path)
    x[2, 3] = torch.nan
    values, _, aux_values, _ = auxk_encode(x, W, b, c, 4, dead, 5)
    assert values[2].isnan().all()
    assert aux_values[2].isnan().all()
    assert values[3].isfinite().all()


def test_errors_name_the_argument():
    x, W, b, c, dead = case("cpu")
    with pytest.raises(TypeError, match=r"dead must be int64 \[n_dead\], got torch\.bool"):
        auxk_encode(x, W, b, c, 4, torch.ones(53, dtype=torch.bool), 5)
    with pytest.raises(ValueError, match="k_aux must be between 1 and the number of dead latents, 17"):
        auxk_encode(x, W, b, c, 4, dead, 18)


def test_the_gradient_of_values_goes_by_the_pairs_that_were_used():
    """grad_values by sampled products: the dense formula, with padding at 0 and a latent twice in a row."""
    g = torch.Generator().manual_seed(5)
    W, b = torch.randn(31, 13, generator=g, dtype=torch.float64), torch.zeros(13, dtype=torch.float64)
    indices = torch.tensor([[3, 3, 7], [30, 0, 1]])
    values = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.5, -1.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 13, generator=g, dtype=torch.float64)
    (found,) = torch.autograd.grad((sparse_decode(values, indices, W, b) * upstream).sum(), values)
    expected = torch.einsum("rd,rkd->rk", upstream, W[indices]) * (values != 0)
    torch.testing.assert_close(found, expected)


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")
@pytest.mark.parametrize("n_dead", [5, 300, 700])
def test_prepared_weights_give_the_same_codes_and_gradients(n_dead, monkeypatch):
    monkeypatch.setattr(auxk, "WEIGHT_TILE_BYTES", 4 * 19 * 100)  # several tiles of dead latents
    x, W, b, c, _ = case("cpu", rows=31, n=1024)
    dead = torch.arange(0, 1024)[
        torch.randperm(1024, generator=torch.Generator().manual_seed(1))[:n_dead].sort().values
    ]
    tensors = [t.requires_grad_() for t in (x, W, b, c)]
    results = []
    for options in ({}, {"prepared": prepare_encoder(W, b)}):
        found = auxk_encode(*tensors, 4, dead, 3, **options)
        gradients = torch.autograd.grad((found[0] ** 2).sum() + found[2].sum(), tensors)
        results.append((*found, *gradients))
    for plain, prefiltered in zip(*results, strict=True):
        torch.testing.assert_close(prefiltered, plain, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="made from other weights"):
        auxk_encode(x, W.detach().clone(), b, c, 4, dead, 3, prepared=prepare_encoder(W, b))
