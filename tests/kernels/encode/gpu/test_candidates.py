"""Design B of topk_encode against the reference in fp64: the contract of design A, with and without its certificate."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode import product
from sparsefeat_kernels.encode.gpu import candidates as topk_candidates
from sparsefeat_kernels.encode.gpu.candidates import CandidateBlocks, default_blocks, kept_for
from sparsefeat_kernels.encode.topk import SELECTIONS, reference
from torch import Tensor

from tests.kernels.encode.test_topk import ROWS_OF_A, assert_is_topk, assert_same, preactivations, problem

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def blocks(kept: int = 1, group: int = 4, latents: int = 16) -> CandidateBlocks:
    """Small tiles: several of them, groups of few latents, and a product that a GPU can make too (16 x 16 x 16)."""
    return CandidateBlocks(16, latents, 16, group, kept, num_warps=4, num_stages=2)


def encode(
    inputs: tuple[Tensor, ...], k: int, selection: str, sizes: CandidateBlocks | None = None
) -> tuple[Tensor, Tensor]:
    sizes = sizes or blocks()
    assert sizes.fits(len(inputs[1]), k), "the test is of a configuration that design B refuses"
    return topk_candidates.topk_candidates_triton(*inputs, k, selection, sizes)


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The counter of every chunk's list of rows without a certificate, filled as the launcher runs."""
    counters: list[Tensor] = []
    finish = topk_candidates._topk_candidates_finish_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]):
            def launch(*args, **options):
                counters.append(args[4].clone())
                return finish[grid](*args, **options)

            return launch

    monkeypatch.setattr(topk_candidates, "_topk_candidates_finish_kernel", Watched())
    return counters


def integers(rows: int, d: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Small integers: sums are exact in any order and tie constantly."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,))
    return tuple(torch.randint(-2, 3, size, generator=g).float().to(DEVICE) for size in sizes)


def expected(inputs: tuple[Tensor, ...], k: int, selection: str) -> tuple[Tensor, Tensor]:
    return reference(*(t.double() for t in inputs), k, selection)


# rows, d, n_latents, k; the configuration: tiles cut off by the end, one tile, groups without latents, k of all groups
SHAPES = {
    "small": (5, 7, 33, 4, blocks()),
    "one": (1, 1, 1, 1, blocks()),
    "first": (18, 20, 70, 1, blocks(kept=2)),
    "one_group": (2, 5, 9, 1, blocks(group=16)),
    "every_group": (3, 6, 90, 24, blocks()),
    "wide_tiles": (3, 18, 150, 5, blocks(kept=3, group=8, latents=128)),  # 16 groups a tile: two outer, eight inner
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is wrong in the interpreter
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_k_largest_within_the_rounding_bound(shape: tuple, dtype: torch.dtype):
    rows, d, n, k, sizes = shape
    inputs = problem(rows, d, n, dtype, DEVICE)
    for selection in SELECTIONS if rows == 5 else ("relu",):
        values, indices = encode(inputs, k, selection, sizes)
        assert values.dtype == torch.float32
        assert indices.dtype == torch.int32
        assert_is_topk(values, indices, *inputs, selection)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", ROWS_OF_A)
def test_ties_nan_infinity_and_zeros(name: str, selection: str):
    inputs = preactivations(torch.tensor(ROWS_OF_A[name], device=DEVICE))
    assert_same(encode(inputs, 5, selection, blocks(group=2)), expected(inputs, 5, selection))


@settings(max_examples=8 if DEVICE == "cuda" else 25, deadline=None)  # a GPU compiles every one
@given(st.integers(0, 2**31), st.integers(0, 4), st.integers(1, 5), st.integers(1, 90), st.data())
def test_small_integers_which_tie_constantly_are_exact(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    sizes = blocks(data.draw(st.integers(1, 3)))
    k = data.draw(st.integers(1, min(n, sizes.n_groups(n))))
    inputs, selection = integers(rows, d, n, seed), data.draw(st.sampled_from(SELECTIONS))
    assert_same(encode(inputs, k, selection, sizes), expected(inputs, k, selection))


# ------------------------------------------------------------------------------------------------- the certificate


def of_latents(**values: float) -> tuple[Tensor, ...]:
    """One row of 64 pre-activations, -1 but for `i<latent>=value`. With tiles of 16 and groups of 4, latent i is in
    group i mod 16."""
    a = torch.full((64,), -1.0, device=DEVICE)
    for name, value in values.items():
        a[int(name[1:])] = value
    return preactivations(a)


# kept entries of a group, pre-activations, k, whether the certificate holds
CERTIFIED = {
    "one of a group": (1, {"i3": 5.0, "i4": 4.0}, 2, True),
    "two of a group, one kept": (1, {"i3": 5.0, "i19": 4.0}, 2, False),
    "two of a group, two kept": (2, {"i3": 5.0, "i19": 4.0}, 2, True),
    "a third of a group, below the k-th": (2, {"i3": 5.0, "i19": 4.0, "i35": 3.0}, 2, True),
    "a third of a group, the k-th": (2, {"i3": 5.0, "i19": 4.0, "i35": 3.0}, 3, False),
    "left out, equal to the k-th": (1, {"i3": 5.0, "i4": 4.0, "i19": 4.0}, 2, False),
}


@pytest.mark.parametrize("case", CERTIFIED.values(), ids=CERTIFIED)
def test_only_rows_that_may_have_lost_an_entry_are_computed_again(case: tuple, lists: list[Tensor]):
    kept, values, k, holds = case
    inputs = of_latents(**values)
    assert_same(encode(inputs, k, "raw", blocks(kept)), expected(inputs, k, "raw"))
    assert [int(count[0]) for count in lists] == [0 if holds else 1]


def test_of_a_row_on_the_list_only_the_groups_that_left_out_too_much_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
):
    # Groups 3 and 6 have two large ones and kept one; groups 4, 8 and 9 have one.
    inputs = of_latents(i3=5.0, i19=4.9, i4=4.5, i6=4.2, i22=4.1, i8=4.05, i9=4.04)
    found = []
    finish = topk_candidates._topk_candidates_finish_kernel

    class Watched:
        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: (found.append(args[1].clone()), finish[grid](*args, **options))

    monkeypatch.setattr(topk_candidates, "_topk_candidates_finish_kernel", Watched())
    assert_same(encode(inputs, 5, "raw", blocks(kept=1)), expected(inputs, 5, "raw"))
    # Group i mod 16 is the (i // 4)-th of tile i mod 4: its number in memory is 4 (i mod 4) + i // 4.
    assert sorted(found[0][0].tolist()) == [*[-1] * 6, 9, 12]


@pytest.mark.parametrize(("kept", "again"), [(3, 0), (2, 1)])
def test_a_group_that_kept_all_it_has_left_out_nothing(kept: int, again: int, lists: list[Tensor]):
    # 20 equal pre-activations: groups of 4 have three latents, or two, and padding
    inputs = preactivations(torch.zeros(20, device=DEVICE))
    assert_same(encode(inputs, 8, "relu", blocks(kept)), expected(inputs, 8, "relu"))
    assert [int(count[0]) for count in lists] == [again]


def test_the_first_latents_of_an_ordered_dictionary_are_in_different_groups(lists: list[Tensor]):
    """A Matryoshka dictionary: a row's k largest are among the first. No row of this one is computed again, with one
    entry kept, as long as no more of them stand out than there are groups."""
    n, k, rows = 256, 12, 6
    sizes = blocks(kept=1, group=4)
    assert sizes.n_groups(n) == 64
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(64, generator=g) for _ in range(rows)]).float()
    a = torch.full((rows, n), -1.0)
    a[:, :64] = order
    inputs = (torch.eye(rows), a.T.contiguous(), torch.zeros(n), torch.zeros(rows))
    inputs = tuple(t.to(DEVICE) for t in inputs)
    assert_same(encode(inputs, k, "relu", sizes), expected(inputs, k, "relu"))
    assert [int(count[0]) for count in lists] == [0]


def test_rows_of_the_list_are_exact_when_every_row_is_on_it(lists: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(topk_candidates, "PERSISTENT", 3)  # fewer programs than rows: each takes several
    rows, n, k = 10, 80, 3
    g = torch.Generator().manual_seed(2)
    a = torch.randint(-3, 4, (rows, n), generator=g).float()
    a[:, 7::20] += 20  # all of one group
    inputs = tuple(t.to(DEVICE) for t in (torch.eye(rows), a.T.contiguous(), torch.zeros(n), torch.zeros(rows)))
    for selection in SELECTIONS:
        assert_same(encode(inputs, k, selection, blocks()), expected(inputs, k, selection))
    assert [int(count[0]) for count in lists] == [rows] * 3


def test_any_number_of_rows_in_chunks_of_bounded_scratch(monkeypatch: pytest.MonkeyPatch, lists: list[Tensor]):
    inputs, k, sizes = integers(37, 5, 70), 4, blocks(kept=2)
    # Of a row: 5 tiles of 4 groups with 2 scores and 2 places kept and one score more, 4 groups again with all entries
    # and a key, x - b_pre, a place on the list.
    row = 20 * (2 * 5 + 4) + 4 * (4 + 4 * 4 + 8) + 4 * 5 + 4
    monkeypatch.setattr(topk_candidates, "TRITON_SCRATCH_BYTES", 18 * row)
    made: list[int] = []
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda x, *size, **o: (made.append((t := new_empty(x, *size, **o)).nbytes), t)[1]
    )
    assert_same(encode(inputs, k, "relu", sizes), expected(inputs, k, "relu"))
    assert len(lists) == 3  # 16 rows, 16, 5
    code = 37 * k * 8
    assert sum(made) - code <= 16 * row


def test_zero_rows():
    _, W, b, c = integers(1, 6, 40)
    values, indices = encode((torch.zeros(0, 6, device=DEVICE), W, b, c), 5, "relu")
    assert values.shape == indices.shape == (0, 5)


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    x, W, b, c = problem(3, 8, 50, torch.float32, DEVICE)
    strided = (
        x.repeat_interleave(2, 1)[:, ::2],
        W.T.contiguous().T,
        b.repeat_interleave(3)[::3],
        c.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    assert all(
        torch.equal(a, e) for a, e in zip(encode(strided, 4, "raw"), encode((x, W, b, c), 4, "raw"), strict=True)
    )


def test_the_same_bits_every_time():
    inputs = problem(5, 9, 60, torch.float32, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(encode(inputs, 6, "raw"), encode(inputs, 6, "raw"), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_host_never_waits_for_the_device(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """The launcher runs on tensors that have no data: any value it asked for would be an error."""
    launched = []

    class Recorded:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *args, **options: launched.append((self.name, grid[0]))

    names = set()
    for module in (topk_candidates, product):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(name))
            names.add(name)
    sizes = ((300, 1280), (20480, 1280), (20480,), (1280,))
    inputs = tuple(torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    found = default_blocks(20480, 32, dtype)
    assert found is not None
    values, _ = topk_candidates.topk_candidates_triton(*inputs, 32, "relu", found)
    assert values.shape == (300, 32)
    assert {name for name, _ in launched} == names - ({"_encoder_bias_kernel"} if dtype == torch.float32 else set())


# --------------------------------------------------------------------------------------------------- configurations


def test_the_least_kept_entries_with_which_a_hundredth_of_rows_fails():
    """Against the expected number of groups with one too many of k latents thrown at random, by counting throws."""
    g = torch.Generator().manual_seed(4)
    for groups, k in ((1280, 32), (4096, 64), (320, 10), (1024, 64)):
        kept = kept_for(groups, k)
        assert kept is not None
        thrown = torch.randint(groups, (4000, k), generator=g).sort(1).values
        failed = (thrown[:, kept:] == thrown[:, :-kept]).any(1).double().mean()  # kept + 1 in one group
        assert failed <= 0.01 + 3 * math.sqrt(0.01 / 4000)
        one_fewer = (thrown[:, kept - 1 :] == thrown[:, : k - kept + 1]).any(1).double().mean() if kept > 1 else 1
        assert one_fewer > 0.005


def test_shapes_that_design_b_leaves_to_design_a():
    assert default_blocks(5120, 160, torch.bfloat16) is None  # half of all groups
    assert default_blocks(18432, 922, torch.bfloat16) is None
    wide = default_blocks(524288, 64, torch.bfloat16)
    assert wide is None or wide.fits(524288, 64)
    assert not blocks().fits(64, 17)  # 16 groups


@pytest.mark.parametrize(
    "change", [{"GROUP": 128}, {"GROUP": 1}, {"KEPT": 0}, {"KEPT": 4}, {"BLOCK_ROWS": 24}], ids=str
)
def test_impossible_configurations_are_refused_by_name(change: dict[str, int]):
    possible = {"BLOCK_ROWS": 16, "BLOCK_LATENTS": 16, "BLOCK_D": 16, "GROUP": 4, "KEPT": 1}
    with pytest.raises(ValueError, match=next(iter(change))):
        CandidateBlocks(**{**possible, **change}, num_warps=4, num_stages=2)
