"""What callers of the kernels get wrong: each is one sentence that names the argument, whatever the op; nothing is answered
that would be wrong. A row each; add yours."""

from __future__ import annotations

import re

import numpy as np
import pytest
import sparsefeat_kernels as kernels
import torch
from torch.autograd import forward_ad

N, D = 11, 6
generator = torch.Generator().manual_seed(3)
x, W, D_dec = (torch.randn(size, D, generator=generator) for size in (5, N, N))
b_enc, b_pre, b_out = torch.randn(N, generator=generator), torch.zeros(D), torch.zeros(D)
values, indices = kernels.topk_encode(x, W, b_enc, b_pre, 3)
query, key = torch.randn(2, 3, 8, 4, generator=generator), torch.randn(2, 3, 5, 4, generator=generator)
dead = torch.tensor([1, 4])


def encode(rows=x, weights=W, bias=b_enc, pre=b_pre, k=3, selection="relu"):
    return kernels.topk_encode(rows, weights, bias, pre, k, selection)


def gradient(coefficients=values, its=indices, rows=x, shift=b_pre, n=N):
    return kernels.weight_gradient(coefficients, its, rows, shift, n)


def aux_gradient(aux=values, its=indices, aux_x=None, which=dead, shift=b_pre):
    return kernels.auxk_weight_gradient(values, indices, x, aux, its, aux_x, which, shift, N)


WRONG = {
    "rows of numpy": (lambda: encode(x.numpy()), r"x must be a tensor, got ndarray; pass torch.as_tensor\(x\)"),
    "rows in a list": (lambda: encode(x.tolist()), r"x must be a tensor, got list; pass torch.as_tensor\(x\)"),
    "no b_pre": (lambda: encode(pre=None), "b_pre must be a tensor, got NoneType; pass one"),
    "sparse rows": (
        lambda: encode(x.to_sparse()),
        r"x must be dense, got layout torch.sparse_coo; pass x.to_dense\(\)",
    ),
    "k of a share": (lambda: encode(k=3.0), "k must be a whole number, got 3.0"),
    "k True": (lambda: encode(k=True), "k must be a whole number, got True"),
    "k None": (lambda: encode(k=None), "k must be a whole number, got None"),
    "selection 3": (lambda: encode(selection=3), "selection must be a text, got 3"),
    "a threshold's number": (
        lambda: kernels.threshold_encode(x, W, b_enc, b_pre, 0.5, 3),
        "threshold must be a tensor, got float; pass one",
    ),
    "b_out None": (lambda: kernels.sparse_decode(values, indices, D_dec, None), "b_out must be a tensor, got NoneType"),
    "query of numpy": (lambda: kernels.attention_map(query.numpy(), key), "query must be a tensor, got ndarray"),
    "key None": (lambda: kernels.attention_map(query, None), "key must be a tensor, got NoneType"),
    "scale in a text": (lambda: kernels.attention_map(query, key, "x"), "scale must be a number or None, got 'x'"),
    "head_weight list": (
        lambda: kernels.attention_map(query, key, None, None, [1, 1, 1]),
        "head_weight must be a tensor, got list",
    ),
    "tokens list": (
        lambda: kernels.attention_map(query, key, tokens=[0, 1]),
        r"tokens must be a tensor, got list; pass torch.as_tensor\(tokens\)",
    ),
    "value of other keys": (
        lambda: kernels.attention_with_map_(torch.zeros(2, 8, 5), query, key, key[:, :, :4]),
        r"value must be \[2, 3, 5, e\] to match key, got shape \(2, 3, 4, 4\)",
    ),
    "gradient of fewer rows": (
        lambda: gradient(rows=x[:3]),
        r"x must be \[5, d\] as the code has 5 rows, got shape \(3,",
    ),
    "gradient of more rows": (
        lambda: gradient(values[:2], indices[:2]),
        r"x must be \[2, d\] as the code has 2 rows, got shape \(5,",
    ),
    "gradient shifted by another width": (
        lambda: gradient(shift=torch.zeros(2)),
        r"shift must have shape \(6,\), got \(2,\)",
    ),
    "gradient the wrong way round": (
        lambda: gradient(indices, values),
        "coefficients must be floating point, got torch.int32",
    ),
    "gradient of other entries": (
        lambda: gradient(its=indices[:, :2]),
        r"coefficients and indices must both be \[rows, k\], got shapes \(5, 3\) and \(5, 2\)",
    ),
    "gradient of short indices": (
        lambda: gradient(its=indices.short()),
        "indices must be int32 or int64, got torch.int16",
    ),
    "gradient to -1 latents": (lambda: gradient(n=-1), "n_latents must be at least 0, got -1"),
    "aux rows": (
        lambda: aux_gradient(values[:2], indices[:2]),
        r"aux_coefficients and aux_indices must both be \[5, k_aux\] as the code has 5 rows",
    ),
    "aux x": (lambda: aux_gradient(aux_x=x[:2]), r"aux_x must have x's shape \(5, 6\), dtype and device, got \(2, 6\)"),
    "aux dead mask": (
        lambda: aux_gradient(which=torch.zeros(N).bool()),
        r"dead must be int64 \[n_dead\], got torch.bool of shape \(11,\); use mask.nonzero\(\)",
    ),
    "aux shift": (lambda: aux_gradient(shift=torch.zeros(1)), r"shift must have shape \(6,\), got \(1,\)"),
    "latent_major the wrong way round": (
        lambda: kernels.latent_major(values, indices, N),
        "values must be floating point, got torch.int32",
    ),
    "a code of lists": (lambda: kernels.SparseCode([[1.0]], [[1]], N), "values must be a tensor, got list"),
    "a code of -1 latents": (
        lambda: kernels.SparseCode(values, indices, -1),
        "n_latents must be a whole number of at least 0",
    ),
    "a code of 'n' latents": (lambda: kernels.SparseCode(values, indices, "n"), "n_latents must be a whole number"),
    "a code on two devices": (
        lambda: kernels.SparseCode(values, indices.to("meta"), N),
        "indices must be on values' device cpu, got meta",
    ),
    "the last latent as -1": (
        lambda: kernels.SparseCode(values, indices, N).select([-1]),
        r"latents must be whole numbers from 0 to 10, got \[-1\]",
    ),
    "a latent beyond": (
        lambda: kernels.SparseCode(values, indices, N).select(torch.tensor([2, N])),
        r"latents must be whole numbers from 0 to 10, got \[2, 11\]",
    ),
    "kernels of a misspelt op": (
        lambda: kernels.implementation("topk", x),
        "op must be one of attention_column_sums, ",
    ),
    "kernels by 'no'": (
        lambda: kernels.force_triton("no").__enter__(),
        "enabled must be True or False, got 'no'",
    ),
    "pursuit of 'no'": (
        lambda: kernels.matching_pursuit(x, W, 2, nonnegative="no"),
        "nonnegative must be True or False, got 'no'",
    ),
    "keep 'a'": (lambda: kernels.keep_gradient_memory("a"), "blocks must be 0 or more, got 'a'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_in_one_sentence(name):
    do, said = WRONG[name]
    with pytest.raises((TypeError, ValueError, IndexError)) as refused:
        do()
    assert re.match(said, str(refused.value))
    assert "\n" not in str(refused.value)


def code_of(rows):
    return kernels.topk_encode(rows, W, b_enc, b_pre, 3)[0]


def in_forward_mode():
    with forward_ad.dual_level():
        code_of(forward_ad.make_dual(x, x))


DERIVATIVES = {
    "jvp": lambda: torch.func.jvp(code_of, (x,), (x,)),
    "jvp of vmap": lambda: torch.func.jvp(torch.vmap(code_of), (x[None],), (x[None],)),
    "vmap of jvp": lambda: torch.vmap(lambda rows: torch.func.jvp(code_of, (rows,), (rows,)))(x[None]),
    "jacfwd": lambda: torch.func.jacfwd(code_of)(x),
    "jacrev": lambda: torch.func.jacrev(code_of)(x),
    "grad": lambda: torch.func.grad(lambda rows: code_of(rows).sum())(x),
    "hessian": lambda: torch.func.hessian(lambda rows: code_of(rows).sum())(x),
    "forward_ad": in_forward_mode,
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_that_torch_takes_of_no_custom_op_is_refused(name):
    """Forward ones would be zero without a word."""
    with pytest.raises(
        NotImplementedError, match=r"topk_encode has no derivative under torch.func .*; use torch.autograd"
    ):
        DERIVATIVES[name]()


def test_what_is_no_derivative_of_the_op_goes_on_beside_one():
    with forward_ad.dual_level():
        assert torch.equal(code_of(x), values)
    _, tangent = torch.func.jvp(lambda rows: (rows.sum(), code_of(x).sum())[0], (x,), (x,))
    assert torch.allclose(tangent, x.sum())
    slope = torch.func.grad(lambda rows: rows.sum() + code_of(rows.detach()).sum())(x)
    assert torch.equal(slope, torch.ones_like(x))


@pytest.mark.parametrize("k", [np.int64(3), torch.tensor(3)])
def test_a_whole_number_of_numpy_or_torch_is_one(k):
    assert torch.equal(encode(k=k)[0], values)
