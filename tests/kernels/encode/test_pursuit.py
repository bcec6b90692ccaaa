"""matching_pursuit against the row-by-row dense reference in fp64, and against what the two methods promise."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import bf16_products, force_triton, matching_pursuit, sparse_decode
from sparsefeat_kernels.encode import rounded as rounded_encoder
from sparsefeat_kernels.encode.pursuit import METHODS, reference
from torch import Tensor

# rows, d, n_atoms, k: more atoms than dimensions and fewer, one of everything, all atoms
SHAPES = {
    "over": (5, 7, 33, 4),
    "under": (4, 12, 5, 3),
    "one": (1, 1, 1, 1),
    "all": (3, 6, 6, 6),
    "long": (2, 5, 40, 11),
}
KINDS = [(method, nonnegative) for method in METHODS for nonnegative in (False, True)]
NAN, INF = torch.nan, torch.inf


def problem(rows: int, d: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, D = torch.randn(rows, d, generator=g), torch.randn(n, d, generator=g)
    return x.to(dtype).to(device), torch.nn.functional.normalize(D, dim=1).to(dtype).to(device)


def assert_same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = 1e-4) -> None:
    assert torch.equal(got[1].cpu(), wanted[1])
    torch.testing.assert_close(
        got[0].double().cpu(), wanted[0].double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def residual(x: Tensor, D: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    z = values.double().new_zeros(x.shape[0], D.shape[0]).scatter_add(1, indices.long(), values.double())
    return x.double() - z @ D.double()


@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_codes_are_those_of_the_reference(
    path: str, shape: tuple[int, int, int, int], method: str, nonnegative: bool
):
    rows, d, n, k = shape
    x, D = problem(rows, d, n, torch.float32, path)
    got = matching_pursuit(x, D, k, method, nonnegative)
    assert (got[0].dtype, got[1].dtype) == (torch.float32, torch.int32)
    assert_same(got, reference(x.cpu().double(), D.cpu().double(), k, method, nonnegative))


@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cpu_path_in_many_chunks(method: str, nonnegative: bool, dtype: torch.dtype, monkeypatch):
    monkeypatch.setitem(matching_pursuit.__globals__, "RESIDUAL_BYTES", 4 * 16 * 8 * 3)
    x, D = problem(41, 16, 200, dtype, "cpu", seed=2)
    got = matching_pursuit(x, D, 8, method, nonnegative)
    assert got[0].dtype == dtype
    assert_same(got, reference(x.double(), D.double(), 8, method, nonnegative))


# Of both kinds: after two steps the best score is 1e-16 or less, and the third step is taken or not.
@pytest.mark.parametrize("k", [2, 3])
def test_a_row_whose_best_score_is_rounding_ends_or_goes_on(k: int):
    x, D = problem(3, 8, 3, torch.float64, "cpu", 3)
    left = residual(x, D, *matching_pursuit(x, D, k, "gradient", True))
    ends, goes_on = (residual(x, D, *reference(x, D, k, "gradient", True, least)) for least in (1e-13, -1e-13))
    near = [torch.isclose(left, each, rtol=1e-8, atol=1e-9).all(1) for each in (ends, goes_on)]
    assert (near[0] | near[1]).all()
    assert torch.equal((ends - goes_on).abs().amax(1) > 1e-3, torch.tensor([k == 3, k == 3, False]))


@settings(max_examples=40)
@given(
    st.integers(0, 2**31), st.integers(0, 9), st.integers(1, 9), st.integers(1, 60), st.sampled_from(KINDS), st.data()
)
def test_wild_shapes(seed: int, rows: int, d: int, n: int, kind: tuple[str, bool], data: st.DataObject):
    x, D = problem(rows, d, n, torch.float64, "cpu", seed)
    k = data.draw(st.integers(1, min(n, d)))  # beyond d steps the residual is rounding, and so is what comes next
    values, indices = matching_pursuit(x, D, k, *kind)
    # Where the residual is down to rounding, the reference's choices are chance: compare what the codes stand for. And
    # where the best score is, rounding decides at each further step whether the row ends: what is left must be what is
    # left where it first may end, or after one of the steps from there on.
    left = residual(x, D, values, indices)
    wanted = ends = residual(x, D, *reference(x, D, k, *kind, least=1e-13))
    before, may_end = x, torch.zeros(rows, 1, dtype=torch.bool)
    for step in range(1, k + 1):
        may_end |= torch.isclose(before, ends, rtol=1e-8, atol=1e-9).all(1, keepdim=True)
        before = residual(x, D, *reference(x, D, step, *kind, least=-1e-13))
        nearer = (left - before).abs().amax(1, keepdim=True) < (left - wanted).abs().amax(1, keepdim=True)
        wanted = torch.where(may_end & nearer, before, wanted)
    torch.testing.assert_close(left, wanted, rtol=1e-8, atol=1e-9)


def test_the_residual_never_grows():
    x, D = problem(50, 16, 100, torch.float64, "cpu")
    for method in METHODS:
        norms = [x.norm(dim=1)]
        for k in range(1, 20):
            norms.append(residual(x, D, *matching_pursuit(x, D, k, method)).norm(dim=1))
        assert all((after <= before + 1e-12).all() for before, after in itertools.pairwise(norms))


def test_gradient_pursuit_comes_closer_than_matching_pursuit():
    x, D = problem(200, 24, 60, torch.float64, "cpu")
    left = {m: residual(x, D, *matching_pursuit(x, D, 12, m)).square().sum() for m in METHODS}
    assert left["gradient"] < left["matching"]


@pytest.mark.parametrize("method", METHODS)
def test_an_exact_sparse_code_over_orthogonal_atoms_is_found(path: str, method: str):
    D = torch.eye(6, device=path)
    x = torch.tensor([[0.0, 3.0, 0.0, -5.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]], device=path)
    values, indices = matching_pursuit(x, D, 3, method)
    torch.testing.assert_close(values.cpu(), torch.tensor([[-5.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
    assert indices.tolist() == [[3, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
def test_ties_take_the_lowest_atom(path: str, method: str, nonnegative: bool):
    atom = torch.tensor([0.6, 0.8], device=path)
    D = torch.stack([atom.flip(0), atom, -atom, atom, -atom])
    values, indices = matching_pursuit(torch.stack([2 * atom, -2 * atom]), D, 2, method, nonnegative)
    torch.testing.assert_close(values[:, 0].cpu(), torch.tensor([2.0, 2.0 if nonnegative else -2.0]))
    assert indices[:, 0].tolist() == [1, 2 if nonnegative else 1]


def test_an_atom_chosen_again_keeps_its_entry(path: str):
    D = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=path), dim=1)
    x = torch.tensor([[1.0, 0.4]], device=path)
    D = torch.cat([D, -D[:1]])
    values, indices = matching_pursuit(x, D, 3, "matching")  # 1 along atom 0, 0.4 / sqrt 2 along 1, -0.2 along 0
    assert indices.tolist() == [[0, 1, 0]]
    torch.testing.assert_close(values.cpu(), torch.tensor([[0.8, 0.4 / 2**0.5, 0.0]]))


@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
def test_rows_of_zeros_and_rows_without_a_positive_product_stop(path: str, method: str, nonnegative: bool):
    x = torch.tensor([[0.0, 0.0], [-1.0, -2.0]], device=path)
    values, indices = matching_pursuit(x, torch.eye(2, device=path), 2, method, nonnegative)
    assert values[0].tolist() == [0.0, 0.0]
    assert indices[0].tolist() == [0, 0]
    assert values[1].tolist() == ([0.0, 0.0] if nonnegative else [-2.0, -1.0])


def test_nonnegative_codes_are_not_negative():
    x, D = problem(60, 10, 50, torch.float32, "cpu")
    for method in METHODS:
        values, _ = matching_pursuit(x, D, 9, method, True)
        assert (values >= 0).all()


@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_only_rows_that_are_not_finite_are_broken(path: str, method: str, nonnegative: bool, bad: float):
    x, D = problem(3, 4, 9, torch.float32, path)
    whole = matching_pursuit(x, D, 3, method, nonnegative)
    x[1, 2] = bad
    values, indices = matching_pursuit(x, D, 3, method, nonnegative)
    assert values[1].isnan().all()
    assert indices[1].tolist() == [0, 1, 2]
    for got, before in zip((values, indices), whole, strict=True):
        assert torch.equal(got[[0, 2]], before[[0, 2]])


def test_an_atom_with_nan_breaks_every_row(path: str):
    x, D = problem(2, 4, 9, torch.float32, path)
    D[5, 1] = NAN
    values, indices = matching_pursuit(x, D, 2)
    assert values.isnan().all()
    assert indices.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_tiny_and_huge_rows_are_coded_as_the_others(path: str, scale: float):
    x, D = problem(3, 6, 20, torch.float32, path, seed=4)
    for method in METHODS:
        values, indices = matching_pursuit(x, D, 4, method)
        scaled_values, scaled_indices = matching_pursuit(x * scale, D, 4, method)
        assert torch.equal(indices, scaled_indices)
        torch.testing.assert_close(scaled_values / scale, values, rtol=1e-4, atol=1e-5)


def test_zero_rows(path: str):
    x, D = problem(0, 4, 9, torch.float32, path)
    values, indices = matching_pursuit(x, D, 3)
    assert values.shape == indices.shape == (0, 3)


def test_strided_inputs_give_what_contiguous_ones_do(path: str):
    x, D = problem(3, 6, 20, torch.float32, path)
    strided = x.T.contiguous().T, D.repeat_interleave(2, 1)[:, ::2]
    assert not any(t.is_contiguous() for t in strided)
    values, indices = matching_pursuit(*strided, 3)
    assert_same((values, indices), tuple(t.cpu() for t in matching_pursuit(x, D, 3)), 1e-6)


def test_the_same_bits_every_time(path: str):
    x, D = problem(3, 6, 20, torch.float32, path)
    for first, second in zip(matching_pursuit(x, D, 3), matching_pursuit(x, D, 3), strict=True):
        assert torch.equal(first, second)


def test_both_paths_choose_the_same_atoms():
    x, D = problem(4, 8, 30, torch.float32, "cpu", seed=7)
    values, indices = matching_pursuit(x, D, 5)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with force_triton():
        found = matching_pursuit(x.to(device), D.to(device), 5)
    assert_same(tuple(t.cpu() for t in found), (values, indices), 1e-5)


def test_the_residual_can_be_decoded_and_differentiated_in_the_dictionary():
    x, D = problem(6, 5, 20, torch.float64, "cpu")
    D.requires_grad_()
    values, indices = matching_pursuit(x, D.detach(), 3)
    (x - sparse_decode(values, indices, D, x.new_zeros(5))).square().sum().backward()
    assert D.grad.abs().sum() > 0


def test_a_backward_pass_through_the_choice_is_refused():
    x, D = problem(2, 4, 9, torch.float32, "cpu")
    values, _ = matching_pursuit(x.requires_grad_(), D, 2)
    with pytest.raises(RuntimeError, match="matching_pursuit"):
        values.sum().backward()


def test_it_compiles_to_one_graph():
    x, D = problem(6, 5, 20, torch.float32, "cpu")

    def code(x, D):
        values, indices = matching_pursuit(x, D, 3)
        return values * 2, indices

    compiled = torch.compile(code, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(code(x, D), compiled(x, D), strict=True):
        assert torch.equal(eager, traced)


MISTAKES = {
    "x must be .rows": (lambda x, D: (x[None], D, 2), ValueError),
    "x must be float": (lambda x, D: (x.half(), D.half(), 2), TypeError),
    "D must be": (lambda x, D: (x, D[:, :-1], 2), ValueError),
    "D must have": (lambda x, D: (x, D.double(), 2), TypeError),
    "k must": (lambda x, D: (x, D, 0), ValueError),
    "k must be": (lambda x, D: (x, D, 10), ValueError),
    "method": (lambda x, D: (x, D, 2, "orthogonal"), ValueError),
    "device": (lambda x, D: (x, D.to("meta"), 2), (ValueError, RuntimeError, NotImplementedError)),
}


@pytest.mark.parametrize("named", MISTAKES)
def test_mistakes_are_refused_by_name(named: str):
    change, error = MISTAKES[named]
    with pytest.raises(error, match=named):
        matching_pursuit(*change(*problem(3, 4, 9, torch.float32, "cpu")))


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")
@pytest.mark.parametrize(("method", "nonnegative"), KINDS)
@pytest.mark.parametrize("kept_bytes", [0, 1 << 20])  # atoms rounded for every step, or once
def test_a_bf16_product_chooses_the_same_atoms(method: str, nonnegative: bool, kept_bytes: int, monkeypatch):
    """Half of the atoms have twins that bf16 cannot tell from them: only the exact products do."""
    for name in ("ROUNDED_ROWS", "ROUNDED_WIDTH", "ROUNDED_PRODUCT"):
        monkeypatch.setattr(rounded_encoder, name, 1)
    monkeypatch.setattr(rounded_encoder, "ROUNDED_TILE_BYTES", 1 << 15)
    monkeypatch.setitem(matching_pursuit.__globals__, "KEPT_BYTES", kept_bytes)
    x, D = problem(19, 24, 512, torch.float32, "cpu", seed=5)
    g = torch.Generator().manual_seed(6)
    D[256:] = torch.nn.functional.normalize(D[:256] + 1e-4 * torch.randn(256, 24, generator=g), dim=1)
    x[3], x[7] = 0, x[7] * 1e-20
    x[5, 1], x[11] = NAN, x[11] * 1e18
    got = matching_pursuit(x, D, 6, method, nonnegative)
    wanted = reference(x.double(), D.double(), 6, method, nonnegative)
    assert torch.equal(got[1], wanted[1])
    size = x.norm(dim=1, keepdim=True).nan_to_num(1).clamp(min=1e-30).double()
    torch.testing.assert_close(got[0].double() / size, wanted[0] / size, atol=1e-5, rtol=0, equal_nan=True)


@pytest.mark.skipif(not bf16_products(), reason="this processor has no bf16 matrix instructions")
def test_the_scratch_does_not_grow_with_rows(one_thread):
    """Of all that is held at a time, with the atoms in bf16 among it."""
    rows, d, n = 3000, 256, 32768
    x, D = problem(rows, d, n, torch.float32, "cpu")
    assert rounded_encoder.pays_to_round(x, D)
    with torch.profiler.profile(profile_memory=True) as profile:
        matching_pursuit(x, D, 2)
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    assert 30 << 20 < most < 64 << 20
