"""sparse_edit and sparse_edit_delta against the dense reference, and the promise that a neutral rule changes no bit."""

import pytest
import torch
from sparsefeat_kernels import sparse_edit, sparse_edit_delta
from sparsefeat_kernels.decode.sparse_edit import reference
from torch import Tensor

INF = torch.inf
SHAPES = {"odd": (5, 3, 2, 7), "one": (1, 1, 1, 1), "many_rules": (4, 18, 9, 20), "wide": (2, 70, 3, 530)}  # rows k F d


def problem(rows: int, k: int, F: int, d: int, device: str, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    n = max(2 * F, k)
    values = torch.randn(rows, k, generator=g).abs()
    values[torch.rand(rows, k, generator=g) < 0.2] = 0
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int()
    latents = torch.randint(0, n, (F,), generator=g)
    gain, offset = torch.randn(F, generator=g), torch.randn(F, generator=g)
    low, high = torch.full((F,), -0.5), torch.full((F,), 1.5)
    gate = torch.where(torch.rand(F, generator=g) < 0.5, -INF, 0.3)
    tensors = values, indices, latents, torch.randn(F, d, generator=g), gain, offset, low, high, gate
    return [t.to(device) for t in (*tensors, torch.rand(rows, generator=g))]


def doubled(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_delta_and_edit_are_the_reference(path: str, shape: tuple[int, int, int, int]):
    arguments = problem(*shape, path)
    expected = reference(*doubled(arguments))
    delta = sparse_edit_delta(*arguments)
    assert delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), expected, rtol=1e-5, atol=1e-5)
    for dtype in (torch.float32, torch.float16):
        x = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype).to(path)
        edited = sparse_edit(x, *arguments)
        assert edited.dtype == dtype
        torch.testing.assert_close(edited, (x.double() + expected).to(dtype), rtol=1e-3, atol=1e-5)


def test_cpu_path_in_blocks_of_rows(monkeypatch):
    monkeypatch.setitem(reference.__globals__, "BLOCK_BYTES", 600)
    arguments = problem(23, 3, 4, 5, "cpu")
    torch.testing.assert_close(sparse_edit_delta(*arguments).double(), reference(*doubled(arguments)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_neutral_rule_returns_x_bit_for_bit(path: str, dtype: torch.dtype, request):
    if dtype == torch.bfloat16 and "triton" in request.node.name and path == "cpu":
        pytest.skip("bfloat16 is wrong in Triton's interpreter")
    values, indices, latents, directions, *_, weight = problem(4, 5, 3, 6, path)
    values[0, :2] = torch.tensor([INF, torch.nan])
    latents = indices[0, :3].long()
    one = torch.ones(3, device=path)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).to(dtype).to(path)
    x[0, :4] = torch.tensor([-0.0, torch.nan, INF, 1e-30])
    edited = sparse_edit(
        x, values, indices, latents, directions, one, 0 * one, -INF * one, INF * one, -INF * one, weight
    )
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(edited.view(integer), x.view(integer))


def test_an_infinite_value_that_is_erased_is_an_error_that_shows(path: str):
    """0 times infinity: NaN in the row, as in the reference, and not the value of a bound."""
    values, indices, latents, directions, *_, weight = problem(4, 5, 3, 6, path)
    values[1, 2] = INF
    latents, one = indices[1, 2:5].long(), torch.ones(3, device=path)
    arguments = values, indices, latents, directions.abs() + 1, 0 * one, 0 * one, -one, one, -INF * one, weight + 1
    delta = sparse_edit_delta(*arguments)
    assert delta[1].isnan().all()
    torch.testing.assert_close(
        delta.double(), reference(*doubled(list(arguments))), rtol=1e-5, atol=1e-5, equal_nan=True
    )


def test_rows_of_weight_zero_keep_their_bits(path: str):
    arguments = problem(5, 3, 2, 7, path)
    arguments[-1] = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], device=path)
    x = torch.full((5, 7), -0.0, device=path)
    edited = sparse_edit(x, *arguments)
    assert torch.signbit(edited[[1, 3, 4]]).all()


def test_no_rules_no_rows_and_no_entries(path: str):
    values, indices, latents, directions, gain, offset, low, high, gate, weight = problem(5, 3, 2, 7, path)
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(2)).to(path)
    none = (t[:0] for t in (latents, directions, gain, offset, low, high, gate))
    assert torch.equal(sparse_edit(x, values, indices, *none, weight), x)
    rule = (latents, directions, gain, offset, low, high, gate)
    assert sparse_edit_delta(values[:0], indices[:0], *rule, weight[:0]).shape == (0, 7)
    absent = sparse_edit_delta(values[:, :0], indices[:, :0], *rule, weight)
    expected = reference(*doubled([values * 0, indices, *rule, weight]))
    torch.testing.assert_close(absent.double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_reach_x_values_and_directions(path: str):
    arguments = problem(5, 3, 2, 7, path, seed=4)
    weight = torch.linspace(-1, 1, 35, device=path).view(5, 7)
    x = torch.zeros(5, 7, device=path, requires_grad=True)
    got = list(arguments)
    got[0], got[3] = (got[i].clone().requires_grad_() for i in (0, 3))
    (sparse_edit(x, *got) * weight).sum().backward()
    expected = doubled(arguments)
    expected[0], expected[3] = (expected[i].requires_grad_() for i in (0, 3))
    (reference(*expected) * weight).sum().backward()
    expected[0].grad[arguments[0] == 0] = 0
    torch.testing.assert_close(x.grad, weight)
    for i in (0, 3):
        torch.testing.assert_close(got[i].grad.double(), expected[i].grad, rtol=1e-5, atol=1e-5)


def test_gradcheck_on_the_cpu_path():
    arguments = doubled(problem(4, 3, 5, 2, "cpu", seed=5))
    arguments[0] = arguments[0] + 0.11
    for i in (0, 3):
        arguments[i].requires_grad_()
    assert torch.autograd.gradcheck(sparse_edit_delta, arguments)


MISTAKES = {
    "latents": (2, lambda t: t.float()),
    "directions": (3, lambda t: t[:1]),
    "gain": (4, lambda t: t[:1]),
    "offset": (5, lambda t: t.int()),
    "low": (6, lambda t: t[None]),
    "row_weight": (9, lambda t: t[:-1]),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    position, change = MISTAKES[named]
    arguments = problem(5, 3, 2, 7, "cpu")
    arguments[position] = change(arguments[position])
    with pytest.raises((ValueError, TypeError), match=f"^{named} must"):
        sparse_edit_delta(*arguments)
    with pytest.raises(ValueError, match=r"^x must"):
        sparse_edit(torch.zeros(4, 7), *problem(5, 3, 2, 7, "cpu"))
