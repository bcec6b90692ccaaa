"""topk_encode from stored pre-activations against the reference in fp64: the contract, where k is a large part of the latents."""

import weakref

import pytest
import sparsefeat_kernels as kernels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import dispatch
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode.auxk import reference as auxk_reference
from sparsefeat_kernels.encode.gpu import stored, topk
from sparsefeat_kernels.encode.product import encoder_bias
from sparsefeat_kernels.encode.topk import SELECTIONS, reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.encode.test_topk import INF, NAN, ROWS_OF_A, assert_is_topk, assert_same, preactivations, problem
from tests.kernels.pretended_gpu import on_gpu

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed, or older than 3.4")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def encode(inputs: tuple[Tensor, ...], k: int, selection: str = "raw", dead: Tensor | None = None):
    x, W, b, c = inputs
    return stored.topk_stored(x, W, encoder_bias(W, b, c), c, k, selection, dead)


def expected(inputs: tuple[Tensor, ...], k: int, selection: str = "raw") -> tuple[Tensor, Tensor]:
    return reference(*(t.double() for t in inputs), k, selection)


def among(inputs: tuple[Tensor, ...], k: int, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Of the dead latents, by the words of auxk_encode."""
    return auxk_reference(*(t.double() for t in inputs), 1, dead, k)[2:]


def integers(rows: int, d: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Small integers: sums are exact in any order and tie constantly."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,))
    return tuple(torch.randint(-2, 3, size, generator=g).float().to(DEVICE) for size in sizes)


# rows, d, n_latents, k: odd sizes; all latents; one; several blocks are moved to the list; k a power of two, and beside one
SHAPES = {
    "small": (5, 7, 33, 4),
    "one": (1, 1, 1, 1),
    "all": (3, 5, 9, 9),
    "first": (4, 8, 70, 1),
    "blocks": (3, 20, 700, 65),
    "power": (2, 6, 128, 64),
    "large k": (2, 6, 60, 40),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is wrong in the interpreter
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_k_largest_within_the_rounding_bound(shape: tuple[int, int, int, int], dtype: torch.dtype):
    rows, d, n, k = shape
    inputs = problem(rows, d, n, dtype, DEVICE)
    for selection in SELECTIONS:
        values, indices = encode(inputs, k, selection)
        assert values.dtype == torch.float32
        assert indices.dtype == torch.int32
        assert_is_topk(values, indices, *inputs, selection)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", ROWS_OF_A)
def test_ties_nan_infinity_and_zeros(name: str, selection: str):
    row = ROWS_OF_A[name]
    inputs = preactivations(torch.tensor(row, device=DEVICE))
    for k in (1, 5, len(row)):
        assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


wild = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, INF, -INF])


@settings(max_examples=8 if DEVICE == "cuda" else 15, deadline=None)
@given(st.lists(wild, min_size=1, max_size=90), st.data())
def test_any_row_of_floats_is_selected_exactly(a: list[float], data: st.DataObject):
    k, selection = data.draw(st.integers(1, len(a))), data.draw(st.sampled_from(SELECTIONS))
    inputs = preactivations(torch.tensor(a, dtype=torch.float32, device=DEVICE))
    assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 5), st.integers(1, 100), st.data())
def test_small_integers_which_tie_constantly_are_exact(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    k, selection = data.draw(st.integers(1, n)), data.draw(st.sampled_from(SELECTIONS))
    inputs = integers(rows, d, n, seed)
    assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


def test_neighbours_in_fp32_are_told_apart():
    """The bisection goes to the last bit: around the k-th value every number differs by one unit in the last place."""
    for base in (1.0, -3e-3, 2.0**-126, 1e38, 0.0):
        bits = (
            torch.tensor([base]).view(torch.int32)
            + torch.randperm(97, generator=torch.Generator().manual_seed(1)).int()
        )
        inputs = preactivations(bits.view(torch.float32).to(DEVICE))
        for selection in SELECTIONS:
            assert_same(encode(inputs, 41, selection), expected(inputs, 41, selection))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_half_precision_where_a_bias_is_infinite(selection: str):
    x, W, b, c = problem(3, 4, 70, torch.float16, DEVICE)
    b[5:68] = -INF
    for k in (4, 9):
        values, indices = encode((x, W, b, c), k, selection)
        wanted = expected((x, W, b, c), k, selection)
        assert torch.equal(indices.long().sort(1).values.cpu(), wanted[1].long().sort(1).values.cpu())
        torch.testing.assert_close(values.double(), wanted[0].to(values.device), rtol=1e-5, atol=1e-5)


def test_only_rows_with_nan_are_broken():
    inputs = integers(4, 6, 300)
    inputs[0][2, 3] = NAN
    for selection in SELECTIONS:
        values, indices = encode(inputs, 30, selection)
        assert values[2].isnan().all()
        assert indices[2].tolist() == list(range(30))
        assert_same((values, indices), expected(inputs, 30, selection))


# ----------------------------------------------------------------------------------------- pieces, chunks, the dead alone


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_LATENTS", 64)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_pieces_give_the_answer_of_the_whole_row(small_pieces: None, selection: str):
    assert stored.stores(150, 21)
    assert not stored.stores(150, 22)  # what is left of three pieces is more than one
    for k in (1, 21):
        inputs = integers(2, 5, 150, seed=k)
        assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


def test_a_row_of_more_latents_than_a_program_takes():
    inputs = integers(1, 3, 33001)
    assert_same(encode(inputs, 700, "relu"), expected(inputs, 700, "relu"))


@pytest.mark.parametrize("name", ["signed_zeros", "tie_at_the_last_place", "one_nan", "infinities", "none_positive"])
def test_pieces_of_rows_with_ties_nan_and_infinities(small_pieces: None, name: str):
    row = (ROWS_OF_A[name] * 100)[:100]
    inputs = preactivations(torch.tensor(row, device=DEVICE))
    for selection in ("relu", "signed"):
        assert_same(encode(inputs, 9, selection), expected(inputs, 9, selection))


def test_chunks_of_rows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "SCRATCH_BYTES", 1500)
    launched: list[int] = []
    kernel = stored._topk_encode_stored_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid[0])
            return kernel[grid]

    monkeypatch.setattr(stored, "_topk_encode_stored_kernel", Counted())
    inputs = integers(11, 5, 50)
    assert_same(encode(inputs, 13, "relu"), expected(inputs, 13, "relu"))
    assert len(launched) > 2
    assert sum(launched) == 11


@pytest.mark.parametrize("tile_bytes", [1 << 20, 4 * 6 * 10], ids=["gathered once", "in tiles"])
@pytest.mark.parametrize("most", [1 << 15, 32], ids=["one piece", "pieces"])
def test_among_the_dead(tile_bytes: int, most: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "GATHERED_BYTES", tile_bytes)
    monkeypatch.setattr(stored, "MOST_LATENTS", most)
    monkeypatch.setattr(stored, "SCRATCH_BYTES", 3000)
    inputs = integers(7, 6, 200)
    inputs[0][3, 1] = NAN
    dead = torch.randperm(200, generator=torch.Generator().manual_seed(2))[:61].sort().values.to(DEVICE)
    for k in (1, 16):
        found, wanted = encode(inputs, k, "relu", dead), among(inputs, k, dead)
        assert found[0][3].isnan().all()
        assert torch.isin(found[1].long(), dead).all()
        finite = torch.arange(7) != 3
        assert_same((found[0][finite], found[1][finite]), (wanted[0][finite], wanted[1][finite]))
        assert found[1][3].tolist() == dead[:k].tolist()  # as the CPU path


def test_zero_rows():
    _, W, b, c = integers(1, 6, 40)
    values, indices = encode((torch.zeros(0, 6, device=DEVICE), W, b, c), 5)
    assert values.shape == indices.shape == (0, 5)


def test_strided_inputs_give_the_code_of_contiguous_ones():
    x, W, b, c = integers(3, 8, 50)
    strided = (
        x.repeat_interleave(2, 1)[:, ::2],
        W.T.contiguous().T,
        b.repeat_interleave(3)[::3],
        c.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    assert_same(encode(strided, 14), expected((x, W, b, c), 14))


def test_the_same_bits_every_time():
    inputs = problem(5, 9, 160, torch.float32, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(encode(inputs, 60), encode(inputs, 60), strict=True))


# ------------------------------------------------------------------------------------------------------- what runs when


@pytest.fixture
def proven(monkeypatch: pytest.MonkeyPatch):
    """Says which names the card has proven."""
    monkeypatch.setattr(dispatch, "backend", lambda: "cuda")
    return lambda *names: monkeypatch.setattr(dispatch, "PROVEN", {"cuda": dict.fromkeys(names, "x.json"), "hip": {}})


def test_its_kernel_is_proven_by_a_name_of_its_own(proven):
    half, wide, double = (
        on_gpu(torch.zeros(2, 3, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    proven("topk_encode")
    assert [topk.way(x, 20480, 32) for x in (half, wide, double)] == ["groups", "groups", "torch"]
    assert topk.way(half, 5120, 160) == "torch"
    proven("topk_encode", "topk_encode_stored")
    assert [topk.way(x, 20480, 32) for x in (half, wide, double)] == ["groups", "stored", "torch"]
    assert topk.way(half, 5120, 160) == topk.way(half, 18432, 922) == topk.way(wide, 5120, 160) == "stored"
    assert topk.way(half, 18432, 1025) == "torch"
    proven()
    with kernels.force_triton():
        assert topk.way(half, 5120, 160) == "stored"
    with kernels.force_triton(False):
        assert topk.way(half, 5120, 160) == "torch"


class Live(TorchDispatchMode):
    """The most bytes that were held at once of what was made, and how often each op was called."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self.called: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        self.called.append(func.overloadpacket._qualified_op_name)
        if isinstance(answer, Tensor) and all(r.alias_info is None for r in func._schema.returns):
            self.bytes += answer.nbytes
            self.most = max(self.most, self.bytes)
            weakref.finalize(answer, self.let_go, answer.nbytes)
        return answer

    def let_go(self, n: int) -> None:
        self.bytes -= n


class Recorded:
    def __init__(self, launched: list[int]):
        self.launched = launched

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.launched.append(grid[0])


# rows, d, n_latents, k, how many are dead (0: all are selected from), launches of the selection
CALLS = {
    "sdxl-unbox": (4096, 1280, 5120, 160, 0, 3),
    "TIDE": (4096, 1152, 18432, 922, 0, 11),
    "SAeUron": (4096, 1280, 20480, 32, 0, 11),
    "SAeUron's dead": (4096, 1280, 20480, 640, 2560, 3),
    "two pieces of dead": (4096, 3072, 65536, 32, 40000, 3 * 32),
    "two pieces": (1024, 3072, 65536, 64, 0, 3 * 8),
    "few rows": (256, 1280, 5120, 160, 0, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_scratch_is_bounded_launches_are_few_and_the_host_waits_for_none(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """At published shapes, on tensors without data: any value that was asked for would be an error."""
    rows, d, n, k, n_dead, launches = CALLS[name]
    assert stored.stores(n_dead or n, k)
    launched: list[int] = []
    monkeypatch.setattr(stored, "_topk_encode_stored_kernel", Recorded(launched))
    x, W, c = (torch.empty(size, dtype=dtype, device="meta") for size in ((rows, d), (n, d), (d,)))
    bias = torch.empty(n, device="meta")
    dead = torch.empty(n_dead, dtype=torch.int64, device="meta") if n_dead else None
    with Live() as live:
        stored.topk_stored(x, W, bias, c, k, "relu", dead)
    results = 8 * rows * k
    assert results < live.most <= results + (64 << 20), (live.most - results) / (1 << 20)
    assert len(launched) == launches


def test_what_is_left_to_others():
    assert stored.stores(5120, 160)
    assert stored.stores(18432, 922)
    assert stored.stores(32768, 1024)
    assert not stored.stores(32768, 1025)
    assert stored.stores(5 * 65536, 1024)
    assert not stored.stores(524288, 64)  # a few rows at once
