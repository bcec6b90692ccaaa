"""The torch implementations as a GPU runs them: every tensor on its device, the reference's answer, and no wait where none
is promised. What a GPU runs by default until its kernels are proven on it."""

from __future__ import annotations

import pytest
import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels import dispatch
from sparsefeat_kernels.attention.map import reference as map_reference
from sparsefeat_kernels.decode.auxk_decode import reference as auxk_decode_reference
from sparsefeat_kernels.decode.sparse_decode import reference as decode_reference
from sparsefeat_kernels.decode.sparse_edit import reference as edit_reference
from sparsefeat_kernels.encode.auxk import reference as auxk_reference
from sparsefeat_kernels.encode.threshold import reference as threshold_reference
from sparsefeat_kernels.encode.topk import reference as topk_reference
from sparsefeat_kernels.feature_stats import reference as statistics_reference
from sparsefeat_kernels.gradient.weight_gradient import reference as gradient_reference

from tests.kernels.pretended_gpu import WIDER, back, on_gpu, pretended, sizes

ops = torch.ops.sparsefeat
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def nothing_is_proven(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dispatch, "PROVEN", {"cuda": {}, "hip": {}})


def tensors(dtype, rows=9, d=13, n=150, k=4):
    g = torch.Generator().manual_seed(7)
    x, W, b, c = (torch.randn(size, generator=g).to(dtype) for size in ((rows, d), (n, d), (n,), (d,)))
    values = torch.rand(rows, k, generator=g, dtype=torch.float64).to(
        dtype if dtype == torch.float64 else torch.float32
    )
    values[::3, 1] = 0
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int()
    dead = torch.randperm(n, generator=g)[:20].sort().values
    return x, W, b, c, values, indices, dead


def wide(*given):
    return [t.double() if t.is_floating_point() else t for t in given]


def close(answers, references, dtype):
    half = dtype == torch.bfloat16
    for answer, reference in zip(answers, references, strict=True):
        answer = back(answer)
        if not answer.is_floating_point():
            assert torch.equal(answer, reference.to(answer.dtype))
            continue
        rtol = 2e-2 if half else 1e-11 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(answer.double(), reference, rtol=rtol, atol=rtol)


def called(op, *arguments):
    """The op's answer on pretended tensors, and what was waited for."""
    with pretended() as waits:
        answer = op(*[on_gpu(a) for a in arguments])
    return ([answer] if isinstance(answer, torch.Tensor) else answer), list(waits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("selection", ["relu", "signed"])
def test_topk_encode_needs_no_wait(dtype, selection):
    x, W, b, c, *_ = tensors(dtype)
    answer, waits = called(ops.topk_encode, x, W, b, c, 4, selection)
    close(answer, topk_reference(*wide(x, W, b, c), 4, selection), dtype)
    assert waits == []


@pytest.mark.skipif(not WIDER, reason="torch before 2.8 has no product with wider sums")
def test_half_precision_is_multiplied_as_it_is(monkeypatch):
    x, W, b, c, _, _, dead = tensors(torch.bfloat16)
    multiplied, product = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *given, **more: multiplied.append(given) or product(*given, **more))
    monkeypatch.setattr(torch, "addmm", None)
    called(ops.topk_encode, x, W, b, c, 4, "raw")
    called(ops.auxk_encode, x, W, b, c, 4, dead, 6, "relu", None, None)
    assert len(multiplied) >= 4
    assert {t.dtype for given in multiplied for t in given} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auxk_encode_needs_no_wait(dtype):
    x, W, b, c, _, _, dead = tensors(dtype)
    answer, waits = called(ops.auxk_encode, x, W, b, c, 4, dead, 6, "relu", None, None)
    close(answer, auxk_reference(*wide(x, W, b, c), 4, dead, 6), dtype)
    assert waits == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_decode_and_its_gradient_need_no_wait(dtype):
    x, W, _, c, values, indices, _ = tensors(dtype)
    answer, waits = called(ops.sparse_decode, values, indices, W, c)
    close(answer, [decode_reference(*wide(values, indices, W, c))], dtype)
    assert waits == []
    (grad,), waits = called(ops.sparse_decode_grad_values, x, values, indices, W)
    dots = (x.double()[:, None] * W.double()[indices.long()]).sum(-1)
    close([grad], [torch.where(values != 0, dots, 0)], dtype)
    assert waits == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k_aux", [2, 6], ids=["sparse", "dense"])
def test_auxk_decode_and_its_gradients(dtype, k_aux):
    """float64 had met a table on the CPU here."""
    x, W, _, c, values, indices, dead = tensors(dtype)
    aux = values[:, [0]].expand(-1, k_aux).contiguous() + torch.arange(k_aux)
    aux_indices = torch.stack([dead[torch.randperm(20)[:k_aux]] for _ in range(len(x))]).int()
    answer, _ = called(ops.auxk_decode, values, indices, aux, aux_indices, dead, W, c)
    close(answer, auxk_decode_reference(*wide(values, indices, aux, aux_indices, dead, W, c)), dtype)
    (grad,), _ = called(ops.auxk_decode_grad_values, x, aux, aux_indices, dead, W)
    close([grad], [torch.where(aux != 0, (x.double()[:, None] * W.double()[aux_indices.long()]).sum(-1), 0)], dtype)
    codes = values, indices, x, aux, aux_indices, None, dead, c
    answer, _ = called(ops.auxk_weight_gradient, *codes, len(W))
    parts = [
        gradient_reference(v.double(), i, x.double(), c.double(), len(W))
        for v, i in ((values, indices), (aux, aux_indices))
    ]
    close(answer, [a + b for a, b in zip(*parts, strict=True)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_gradient(dtype):
    x, W, _, c, values, indices, _ = tensors(dtype)
    answer, _ = called(ops.weight_gradient, values, indices, x, c, len(W))
    close(answer, gradient_reference(*wide(values, indices, x, c), len(W)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_edit_and_its_gradients_need_no_wait(dtype):
    """Under a CUDA graph, or where steering takes gradients, the host must not ask how many latents differ."""
    x, W, _, _, values, indices, _ = tensors(dtype)
    latents = indices[0].long()[[2, 0, 2]]  # one of them by two rules
    rule = [
        torch.tensor(t, dtype=torch.float32) for t in ((0.5, -1, 2), (0.1, 0, 1), (-1, -1, -1), (3, 3, 3), (0, 0, 0))
    ]
    arguments = values, indices, latents, W[latents], *rule, torch.linspace(0, 1, len(x))
    (delta,), waits = called(ops.sparse_edit_delta, *arguments)
    close([delta], [edit_reference(*wide(*arguments))], dtype)
    assert waits == []
    exact = [t.requires_grad_() if place in (0, 3) else t for place, t in enumerate(wide(*arguments))]
    wanted = torch.autograd.grad((edit_reference(*exact) * x.double()).sum(), (exact[0], exact[3]))
    wanted = torch.where(values != 0, wanted[0], 0), wanted[1]
    for op, grad in zip((ops.sparse_edit_grad_values, ops.sparse_edit_grad_directions), wanted, strict=True):
        answer, waits = called(op, x.to(delta.dtype), *arguments)
        close(answer, [grad], dtype)
        assert waits == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threshold_encode(dtype):
    x, W, b, c, *_ = tensors(dtype)
    x[3, 2] = torch.nan
    answer, _ = called(ops.threshold_encode, x, W, b, c, torch.tensor(2.0), 40)
    wanted = threshold_reference(*wide(x, W, b, c), torch.tensor(2.0), 40)
    torch.testing.assert_close(back(answer[0]).double(), wanted[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(back(answer[1]), wanted[1])
    wanted = threshold_reference(*wide(x, W, b, c), torch.tensor(2.0), len(W))
    (values, _, offsets), _ = called(ops.threshold_encode_csr, x, W, b, c, torch.tensor(2.0))
    assert torch.equal(back(offsets).diff(), wanted[2].long())
    kept = back(values)
    assert kept.isnan().sum() == 1
    torch.testing.assert_close(kept[~kept.isnan()].double(), wanted[0][wanted[0] > 0], rtol=1e-4, atol=1e-4)


def test_feature_stats():
    *_, values, indices, _ = tensors(torch.float32)
    group = torch.arange(len(values)) % 3 - 1
    tables = torch.zeros(2, 150), torch.zeros(2, 150, dtype=torch.int32), torch.zeros(2, 150)
    wanted = statistics_reference(*tables, values, indices, group)
    given = [on_gpu(t) for t in tables]
    called(ops.feature_stats_, *given, values, indices, group)
    close(given, [t.double() if t.is_floating_point() else t for t in wanted], torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_maps_and_rows_need_no_wait(dtype):
    g = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(3, 4, n, 8, generator=g).to(dtype) for n in (11, 7, 7))
    key, value = key[:, :2], value[:, :2]
    wide_dtype = dtype if dtype == torch.float64 else torch.float32
    mask, group = torch.rand(3, 7, generator=g) < 0.8, torch.tensor([1, -1, 1])
    mask[:, 0] = True
    weight, tokens = torch.linspace(0.1, 1, 4), torch.tensor([6, 0, 9])
    maps = torch.ones(2, 11, 3, dtype=wide_dtype)
    rest = 8**-0.5, mask, weight, group, tokens
    wanted = map_reference(*wide(maps, query, key, value), 8**-0.5, mask, weight.double(), group, tokens)
    there = on_gpu(maps.clone())
    (out,), waits = called(ops.attention_with_map_, there, query, key, value, *rest)
    close([there, out], wanted, dtype)
    assert waits == []
    (lse, _, _), waits = called(ops.attention_rows, query, key, 8**-0.5, mask, None)
    assert waits == []
    full = map_reference(*wide(torch.zeros(2, 11, 7), query, key, value), 8**-0.5, mask, weight.double(), group, None)[
        0
    ]
    tapped, sums = (on_gpu(torch.zeros(size, dtype=wide_dtype)) for size in ((2, 11, 7), (2, 7)))
    assert called(ops.attention_tap_, tapped, query, key, lse, *rest[:-1])[1] == []
    assert called(ops.attention_column_sums_, sums, query, key, lse, *rest[:-1])[1] == []
    close([tapped, sums], [full, full.sum(1)], dtype)


def test_matching_pursuit():
    x, W, *_ = tensors(torch.float32)
    answer, waits = called(ops.matching_pursuit, x, W, 3, "matching", False)
    assert waits == []
    close(answer, kernels.matching_pursuit(x.double(), W.double(), 3, "matching"), torch.float32)


def test_preparing_an_encoder_and_encoding_with_it():
    x, W, b, c, *_ = tensors(torch.float32)
    with pretended():
        gpu_W, gpu_b = on_gpu(W), on_gpu(b)
        prepared = kernels.prepare_encoder(gpu_W, gpu_b)
        assert not kernels.prefilter_pays(gpu_W, 4096, 4)
        answer = kernels.topk_encode(on_gpu(x), gpu_W, gpu_b, on_gpu(c), 4, prepared=prepared)
    close(answer, topk_reference(*wide(x, W, b, c), 4), torch.float32)


def test_what_is_held_beside_inputs_and_outputs_does_not_grow_with_rows():
    """Chunks of rows: the largest tensor of one call at twice the rows is the largest at once the rows."""
    largest = []
    for rows in (600, 1200):
        x, W, b, c, *_ = tensors(torch.float32, rows=rows, d=4, n=20000)
        called(ops.topk_encode, x, W, b, c, 4, "relu")
        largest.append(max(sizes))
    assert 1 << 20 < largest[1] <= largest[0] <= 64 << 20


def test_kernels_run_on_request_and_no_op_is_the_default_without_a_record(monkeypatch):
    x = on_gpu(torch.zeros(2, 3))
    assert dispatch.implementation("topk_encode", x) == "torch"
    with kernels.force_triton():
        assert dispatch.implementation("topk_encode", x) == ("triton" if dispatch.TRITON_AVAILABLE else "torch")
        assert dispatch.implementation("topk_encode", on_gpu(torch.zeros(2).double())) == "torch"
    monkeypatch.setattr(dispatch, "TRITON_AVAILABLE", True)
    monkeypatch.setattr(dispatch, "PROVEN", {"cuda": {"topk_encode": "x.json"}, "hip": {}})
    monkeypatch.setattr(dispatch, "backend", lambda: "cuda")
    assert dispatch.implementation("topk_encode", x) == "triton"
    assert dispatch.implementation("sparse_decode", x) == "torch"
    with kernels.force_triton(False):
        assert dispatch.implementation("topk_encode", x) == "torch"
    monkeypatch.setattr(dispatch, "backend", lambda: "hip")
    assert dispatch.implementation("topk_encode", x) == "torch"


def test_without_the_interpreter_a_request_leaves_tensors_on_a_cpu_alone(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with kernels.force_triton():
        assert dispatch.implementation("topk_encode", torch.zeros(2, 3)) == "torch"
