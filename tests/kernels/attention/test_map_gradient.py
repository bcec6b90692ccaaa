"""attention_map and its gradients against autograd through the dense reference in fp64."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from sparsefeat_kernels import attention_map, attention_map_, force_triton
from sparsefeat_kernels.attention import map_gradient_cpu, scores
from sparsefeat_kernels.attention.map_gradient import reference
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from torch import Tensor

# batch, heads, key heads, n, t, d
SHAPES = {
    "odd": (2, 3, 3, 19, 7, 3),
    "grouped": (1, 4, 2, 5, 18, 40),
    "wide": (1, 2, 1, 17, 9, 72),
    "many_keys": (1, 2, 2, 3, 300, 5),
    "many_rows": (1, 1, 1, 70, 3, 4),
    "one": (1, 1, 1, 1, 1, 1),
}
# Half precision: the gradient is rounded to query's dtype, and dS before its product.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3}


@pytest.fixture(params=["kept", "made again", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device to put tensors on. On a CPU plain torch keeps the probabilities of attentions as small as these, or the op
    makes them again; or Triton's launcher runs."""
    if request.param == "triton" and not TRITON_AVAILABLE:
        pytest.skip("Triton is not installed")
    if request.param != "kept":
        monkeypatch.setattr(map_gradient_cpu, "KEPT_BYTES", -1)
    with force_triton() if request.param == "triton" else nullcontext():
        yield "cuda" if request.param == "triton" and torch.cuda.is_available() else "cpu"


def problem(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """query, key, and a gradient of the maps of all keys."""
    batch, heads, key_heads, n, t, d = shape
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, n, heads, d, generator=g, dtype=torch.float64).to(dtype).transpose(1, 2)
    key = torch.randn(batch, key_heads, t, d, generator=g, dtype=torch.float64).to(dtype)
    grad = torch.randn(batch, n, t, generator=g, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return query.to(device).requires_grad_(), key.to(device).requires_grad_(), grad.to(wide).to(device)


def compare(query: Tensor, key: Tensor, grad: Tensor, scale=None, mask=None, head_weight=None, tokens=None):
    """Maps and gradients of both, checked against each other; ours are returned."""
    maps = attention_map(query, key, scale, mask, head_weight, tokens)
    ours = torch.autograd.grad(maps, (query, key), grad)
    wide = [t.detach().double().requires_grad_() for t in (query, key)]
    exact = mask if mask is None or mask.dtype == torch.bool else mask.double()
    wanted = reference(*wide, query.shape[-1] ** -0.5 if scale is None else scale, exact, head_weight, tokens)
    theirs = torch.autograd.grad(wanted, wide, grad.double())
    torch.testing.assert_close(maps.double(), wanted, rtol=3e-6, atol=3e-6)
    tolerance = TOLERANCE[query.dtype]
    for mine, other, given in zip(ours, theirs, (query, key), strict=True):
        assert mine.dtype == given.dtype
        limit = tolerance * max(1.0, float(other.abs().max()))
        torch.testing.assert_close(mine.double(), other, rtol=tolerance, atol=limit)
    return maps, *ours


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_are_those_of_the_dense_softmax(path: str, shape: tuple[int, ...], dtype: torch.dtype):
    query, key, grad = problem(shape, dtype, path)
    maps, _, _ = compare(query, key, grad)
    if map_gradient_cpu.KEPT_BYTES > 0:
        return
    alone = torch.zeros_like(maps)
    attention_map_(alone, query.detach(), key.detach())
    assert torch.equal(maps, alone)


@pytest.mark.parametrize(("positions", "kept_bytes"), [(256, 4 * 4 * 256 * 32), (257, 0)])
def test_no_more_is_kept_than_is_said(monkeypatch: pytest.MonkeyPatch, positions: int, kept_bytes: int):
    """Both sides of the border, of 4 x 256 x 32 probabilities."""
    monkeypatch.setattr(map_gradient_cpu, "KEPT_BYTES", 4 * 4 * 256 * 32)
    query, key, grad = problem((1, 4, 4, positions, 32, 2), torch.float32, "cpu")
    found: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor) or tensor, lambda tensor: tensor):
        attention_map(query, key)
    large = {tensor.data_ptr(): tensor.nbytes for tensor in found if tensor.numel() > max(query.numel(), key.numel())}
    assert sum(large.values()) == kept_bytes
    compare(query, key, grad)


def test_finite_differences_agree():
    """Nothing of ours but the op itself: torch's own numerical derivative."""
    query, key, _ = problem((2, 4, 2, 5, 6, 3), torch.float64, "cpu")
    mask = torch.rand(2, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[:, 0] = True
    weight = torch.tensor([0.5, -2.0, 0.0, 1.5], dtype=torch.float64)
    tokens = torch.tensor([3, 0, 3, 9])

    def run(query: Tensor, key: Tensor) -> Tensor:
        return attention_map(query, key, 0.8, mask, weight, tokens)

    assert torch.autograd.gradcheck(run, (query, key))


@pytest.mark.parametrize("tokens", [[3, 0, 3], [8], [9, 2, -1], [4, 4, 4, 4]])
def test_chosen_tokens_repeated_and_out_of_range_and_weighted_heads(path: str, tokens: list[int]):
    query, key, _ = problem((2, 4, 2, 18, 9, 5), torch.float32, path)
    weight = torch.tensor([0.0, 1.5, -2.0, 0.25], device=path)
    chosen = torch.tensor(tokens, dtype=torch.int32, device=path)
    grad = torch.randn(2, 18, len(tokens), generator=torch.Generator().manual_seed(3)).to(path)
    maps, _, _ = compare(query, key, grad, scale=0.7, head_weight=weight, tokens=chosen)
    assert (maps[..., -1] == 0).all() == (tokens[-1] < 0)


@pytest.mark.parametrize("is_bias", [False, True], ids=["bool", "bias"])
@pytest.mark.parametrize("shape", [(2, 11), (2, 1, 1, 11), (1, 4, 1, 11), (2, 1, 19, 11)], ids=str)
def test_masked_keys_have_no_gradient_whatever_they_hold(path: str, shape: tuple[int, ...], is_bias: bool):
    query, key, grad = problem((2, 4, 2, 19, 11, 3), torch.float32, path)
    g = torch.Generator().manual_seed(5)
    kept = torch.rand(shape, generator=g).to(path) > 0.3
    kept[..., 4], kept[..., 0] = False, True
    mask = torch.randn(shape, generator=g).to(path).masked_fill(~kept, -torch.inf) if is_bias else kept
    _, grad_query, grad_key = compare(query, key, grad, mask=mask)
    assert (grad_key[:, :, 4] == 0).all()
    for broken in (torch.nan, torch.inf):
        spoiled = key.detach().clone()
        spoiled[:, :, 4] = broken
        again = torch.autograd.grad(attention_map(query, spoiled.requires_grad_(), mask=mask), (query, spoiled), grad)
        assert torch.equal(again[0], grad_query)
        assert torch.equal(again[1], grad_key)


def test_a_row_whose_keys_are_all_masked_has_no_gradient(path: str):
    query, key, grad = problem((2, 2, 2, 3, 5, 4), torch.float32, path)
    kept = torch.ones(2, 5, dtype=torch.bool, device=path)
    kept[1] = False
    maps, grad_query, grad_key = compare(query, key, grad, mask=kept)
    assert (maps[1] == 0).all()
    assert (grad_query[1] == 0).all()
    assert (grad_key[1] == 0).all()
    assert (grad_query[0] != 0).any()


def test_a_broken_query_breaks_its_own_gradient_and_that_of_the_keys(path: str):
    query, key, grad = problem((1, 2, 2, 18, 6, 4), torch.float32, path)
    _, clean, _ = compare(query, key, grad)
    spoiled = query.detach().clone()
    spoiled[0, 1, 3, 2] = torch.nan
    spoiled.requires_grad_()
    grad_query, grad_key = torch.autograd.grad(attention_map(spoiled, key), (spoiled, key), grad)
    assert grad_query[0, 1, 3].isnan().all()
    assert grad_key[0, 1].isnan().all()
    assert grad_key[0, 0].isfinite().all()
    grad_query[0, 1, 3] = clean[0, 1, 3]
    assert torch.equal(grad_query, clean)


def test_a_tiny_gradient_of_the_maps_does_not_underflow_in_half_precision(path: str):
    """1e-7 is a denormal of fp16; its products with probabilities would be 0 there."""
    query, key, grad = problem((1, 2, 2, 17, 7, 8), torch.float16, path)
    maps = attention_map(query, key)
    large = torch.autograd.grad(maps, (query, key), grad, retain_graph=True)
    small = torch.autograd.grad(maps, (query, key), grad * 2.0**-9)
    for a, b in zip(large, small, strict=True):
        torch.testing.assert_close(b.double() * 2.0**9, a.double(), rtol=1e-2, atol=2.0**-14)


def test_large_scores_give_finite_gradients_and_a_zero_gradient_gives_zero(path: str):
    query, key, grad = problem((1, 2, 2, 17, 6, 4), torch.float32, path)
    far = [(t.detach() * 1e3).requires_grad_() for t in (query, key)]
    assert all(g.isfinite().all() for g in torch.autograd.grad(attention_map(*far), far, grad))
    assert all((g == 0).all() for g in torch.autograd.grad(attention_map(query, key), (query, key), grad * 0))


def test_the_same_bits_every_run_and_gradients_at_any_strides(path: str):
    """On a GPU other strides may be other bits: its compiler shares a sum out among threads by what lies side by side."""
    query, key, grad = problem((2, 2, 2, 35, 20, 6), torch.float32, path)
    _, *first = compare(query, key, grad)
    _, *again = compare(query, key, grad)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    strided = grad.transpose(1, 2).contiguous().transpose(1, 2)
    dense = (
        query.detach().contiguous().requires_grad_(),
        key.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(),
    )
    _, *other = compare(*dense, strided)
    _, *again = compare(*dense, strided)
    assert all(torch.equal(a, b) for a, b in zip(other, again, strict=True))
    assert path == "cuda" or all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_nothing_to_attend_to_or_from(path: str):
    query, key, _ = problem((2, 2, 2, 5, 3, 4), torch.float32, path)
    for q, k in ((query[:, :, :0], key), (query, key[:, :, :0]), (query[:0], key[:0])):
        maps = attention_map(q, k)
        assert maps.shape == (q.shape[0], q.shape[2], k.shape[2])
        for grad, of in zip(torch.autograd.grad(maps.sum(), (q, k)), (q, k), strict=True):
            assert torch.equal(grad, torch.zeros_like(of))


def test_tokens_of_an_attention_without_keys_have_maps_of_zeros(path: str):
    query, key, _ = problem((2, 2, 2, 5, 3, 4), torch.float32, path)
    none = key[:, :, :0]
    maps = attention_map(query, none, tokens=torch.tensor([0, -1, 3], device=query.device))
    assert torch.equal(maps, maps.new_zeros(2, 5, 3))
    for grad, of in zip(torch.autograd.grad(maps.sum(), (query, none)), (query, none), strict=True):
        assert torch.equal(grad, torch.zeros_like(of))


def test_a_row_whose_scores_all_overflow_downwards_has_neither_a_map_nor_a_gradient(path: str):
    query, key, _ = problem((1, 3, 3, 6, 5, 4), torch.float32, path)
    with torch.no_grad():
        key[:] = key.abs() + 1
        query[0, 1, 2] = -3e38
    maps = attention_map(query, key)
    torch.testing.assert_close(maps, attention_map(query.detach(), key.detach()))
    assert maps[0, 2].sum().item() == pytest.approx(2)
    grad_query, grad_key = torch.autograd.grad(maps[..., 0].sum(), (query, key))
    assert grad_query.isfinite().all()
    assert grad_key.isfinite().all()
    assert torch.equal(grad_query[0, 1, 2], torch.zeros_like(grad_query[0, 1, 2]))


@pytest.mark.parametrize("block_bytes", [1, 300, 5000])
def test_blocks_of_any_size_give_the_gradients_of_the_reference_to_rounding(
    monkeypatch: pytest.MonkeyPatch, block_bytes: int
):
    monkeypatch.setattr(map_gradient_cpu, "KEPT_BYTES", -1)
    monkeypatch.setattr(scores, "BLOCK_BYTES", block_bytes)
    compare(*problem((2, 3, 1, 70, 9, 4), torch.float64, "cpu"))


def test_compiled_to_one_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()  # real memory: torch traces the programs that allocate
    query, key, grad = problem((2, 3, 3, 19, 7, 4), torch.float32, "cpu")

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return (attention_map(query, key).softmax(-1) * grad).sum()

    wanted = torch.autograd.grad(loss(query, key), (query, key))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(query, key), (query, key)), wanted)


def test_mistakes_are_refused_by_name():
    query, key, _ = problem((2, 2, 2, 5, 3, 4), torch.float32, "cpu")
    with pytest.raises(ValueError, match="query must be"):
        attention_map(query[0], key)
    with pytest.raises(TypeError, match="key must have query's dtype"):
        attention_map(query, key.half())
    with pytest.raises(ValueError, match="mask requires a gradient, and attention_map gives one to query and key only"):
        attention_map(query, key, mask=torch.zeros(2, 3, requires_grad=True))
    with pytest.raises(ValueError, match="head_weight requires a gradient"):
        attention_map(query, key, head_weight=torch.ones(2, requires_grad=True))
    with pytest.raises(TypeError, match="tokens must be int32"):
        attention_map(query, key, tokens=torch.zeros(3))
    with pytest.raises(ValueError, match="tokens must have one dimension"):
        attention_map(query, key, tokens=torch.zeros(1, 3, dtype=torch.int32))
