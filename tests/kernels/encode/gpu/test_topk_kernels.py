"""topk_encode's kernels against the reference in fp64: the contract, attacked by somebody who knows the groups and the proof."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from sparsefeat_kernels.encode import product
from sparsefeat_kernels.encode.gpu import groups, select, tiles, topk
from sparsefeat_kernels.encode.topk import SELECTIONS, reference
from torch import Tensor

from tests.kernels.encode.test_topk import (
    INF,
    NAN,
    ROWS_OF_A,
    assert_is_topk,
    assert_same,
    preactivations,
    problem,
    row_of,
)

pytestmark = pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed, or older than 3.4")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"BLOCK_ROWS": 16, "BLOCK_LATENTS": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
WIDE = SMALL | {"BLOCK_LATENTS": 128}


def encode(
    inputs: tuple[Tensor, ...], k: int, selection: str = "raw", blocks: dict[str, int] = SMALL
) -> tuple[Tensor, Tensor]:
    return topk.topk_encode_triton(*inputs, k, selection, blocks=blocks)


def expected(inputs: tuple[Tensor, ...], k: int, selection: str = "raw") -> tuple[Tensor, Tensor]:
    return reference(*(t.double() for t in inputs), k, selection)


def integers(rows: int, d: int, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    """Small integers: sums are exact in any order and tie constantly."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d), (n, d), (n,), (d,))
    return tuple(torch.randint(-2, 3, size, generator=g).float().to(DEVICE) for size in sizes)


def rows_of(a: Tensor) -> tuple[Tensor, ...]:
    """Inputs whose pre-activations are `a` [rows, n] exactly."""
    rows, n = a.shape
    return tuple(t.to(DEVICE) for t in (torch.eye(rows), a.T.contiguous(), torch.zeros(n), torch.zeros(rows)))


def of_group(group: int, stretches: int = 1) -> list[int]:
    """The latents of a group, by place, from the words of groups.py alone: two neighbours of each octet of 64."""
    tile, within = divmod(group, 4 * stretches)
    pair, stretch = divmod(within, stretches)
    first = (tile * stretches + stretch) * 64
    return [first + 8 * octet + 2 * pair + neighbour for octet in range(8) for neighbour in range(2)]


class Watched:
    """A kernel whose launches are told, with their arguments, before they run."""

    def __init__(self, kernel, told):
        self.kernel, self.told = kernel, told

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **options):
            self.told(*args)
            return self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every repair, how many rows were on its list."""
    counts: list[int] = []
    repair = select._topk_encode_repair_kernel
    monkeypatch.setattr(
        select, "_topk_encode_repair_kernel", Watched(repair, lambda *args: counts.append(int(args[5][0])))
    )
    return counts


# rows, d, n_latents, k; the tile: several tiles, one, cut off by the end, k of more entries than groups keep
SHAPES = {
    "small": (5, 7, 133, 4, SMALL),
    "one": (1, 1, 1, 1, SMALL),
    "first": (18, 20, 70, 1, SMALL),
    "all": (3, 5, 9, 9, SMALL),
    "more than is kept": (2, 6, 60, 40, SMALL),
    "wide": (3, 18, 300, 5, WIDE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)  # bfloat16 is wrong in the interpreter
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_k_largest_within_the_rounding_bound(shape: tuple, dtype: torch.dtype):
    rows, d, n, k, blocks = shape
    inputs = problem(rows, d, n, dtype, DEVICE)
    for selection in SELECTIONS if rows == 5 else ("relu",):
        values, indices = encode(inputs, k, selection, blocks)
        assert values.dtype == torch.float32
        assert indices.dtype == torch.int32
        assert_is_topk(values, indices, *inputs, selection)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("name", ROWS_OF_A)
def test_ties_nan_infinity_and_zeros(name: str, selection: str):
    inputs = preactivations(row_of(ROWS_OF_A, name, DEVICE))
    assert_same(encode(inputs, 5, selection), expected(inputs, 5, selection))


@settings(max_examples=8 if DEVICE == "cuda" else 12)  # a GPU compiles every one
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 150), st.data())
def test_small_integers_which_tie_constantly_are_exact(seed: int, rows: int, d: int, n: int, data: st.DataObject):
    k = data.draw(st.integers(1, min(n, 20)))
    inputs, selection = integers(rows, d, n, seed), data.draw(st.sampled_from(SELECTIONS))
    assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_half_precision_where_a_bias_is_infinite(selection: str):
    """What masks latents: nobody's value, unless nothing else is left."""
    x, W, b, c = problem(3, 4, 70, torch.float16, DEVICE)
    b[5:68] = -INF
    for k in (4, 9):
        values, indices = encode((x, W, b, c), k, selection)
        wanted = expected((x, W, b, c), k, selection)
        assert torch.equal(indices.long().sort(1).values.cpu(), wanted[1].long().sort(1).values.cpu())
        torch.testing.assert_close(values.double(), wanted[0].to(values.device), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- an adversary


def near(base: float, ulps: int) -> float:
    """The fp32 number that many units in the last place above `base` (below for a negative one)."""
    return struct.unpack("f", struct.pack("i", struct.unpack("i", struct.pack("f", base))[0] + ulps))[0]


@settings(max_examples=10 if DEVICE == "cuda" else 30)
@given(st.data())
def test_values_that_differ_in_the_bits_that_keys_leave_out(data: st.DataObject):
    """Into few groups, around one number, on both sides of where a key's bits change: the k-th, what is left out, and
    ties of these."""
    base = data.draw(st.sampled_from([1.0, 1000.0, 3e-3, -1.0, -70000.0, 1e30, 2.0**-120]))
    selection, k = data.draw(st.sampled_from(SELECTIONS)), data.draw(st.integers(1, 6))
    place = st.tuples(st.sampled_from([0, 1, 5]), st.integers(0, 15))
    chosen = data.draw(st.dictionaries(place, st.integers(0, 40), min_size=1, max_size=24))
    a = torch.full((130,), -abs(base) * 2 if selection != "signed" else base / 2)
    for (group, at), ulps in chosen.items():
        a[of_group(group)[at]] = near(base, ulps)
    if data.draw(st.booleans()) and selection == "signed":
        a[::3] *= -1
    inputs = rows_of(a[None])
    assert_same(encode(inputs, k, selection), expected(inputs, k, selection))


@settings(max_examples=8 if DEVICE == "cuda" else 12)
@given(st.integers(0, 2**31), st.sampled_from([100.0, 4096.0, -4096.0, 1e6]), st.integers(1, 6), st.integers(1, 5))
def test_a_bias_far_larger_than_what_differs_under_it(seed: int, bias: float, d: int, k: int):
    """Fewer than 16 products of integers and a bias that is a power of two away: the sums are exact, and a key would cut
    off all in which they differ."""
    x, W, b, c = integers(3, d, 100, seed)
    scale = 2.0 ** (math.floor(math.log2(abs(bias))) - 19)
    W *= scale
    b += bias
    b = (b / scale).round() * scale
    assert_same(encode((x, W, b, c), k), expected((x, W, b, c), k))


CERTIFIED = {  # of group 0 by place, of group 1; k; whether the row is proved
    "one of a group": ({0: 5.0}, {0: 4.0}, 2, True),
    "two of a group": ({0: 5.0, 9: 4.0}, {}, 2, True),
    "a third, below the k-th": ({0: 5.0, 9: 4.0, 3: 3.0}, {}, 2, True),
    "a third, the k-th": ({0: 5.0, 9: 4.0, 3: 3.0}, {}, 3, False),
    "a third, equal to the k-th": ({0: 5.0, 9: 4.0, 3: 4.0}, {}, 2, False),
    "a third, equal but for what keys leave out": ({0: 5.0, 9: near(4.0, 9), 3: near(4.0, 2)}, {}, 2, False),
    "a third, a key below the k-th": ({0: 5.0, 9: near(4.0, 16), 3: near(4.0, 15)}, {}, 2, True),
    "all of a group": (dict.fromkeys(range(16), 5.0), {}, 12, False),
}


@pytest.mark.parametrize("case", CERTIFIED.values(), ids=CERTIFIED)
def test_only_rows_that_may_have_lost_an_entry_are_computed_again(case: tuple, listed: list[int]):
    of_first, of_second, k, proved = case
    a = torch.linspace(-2, -1, 140)
    for group, entries in ((0, of_first), (1, of_second)):
        for place, value in entries.items():
            a[of_group(group)[place]] = value
    inputs = rows_of(a[None])
    assert_same(encode(inputs, k), expected(inputs, k))
    assert listed == [0 if proved else 1]


def test_only_the_suspects_are_computed_again(monkeypatch: pytest.MonkeyPatch):
    """W is poisoned after the product, but for the latents of the one group that may have left out too much."""
    a = torch.linspace(-2, -1, 140)
    group = of_group(2)
    a[group[:4]], a[of_group(5)[1]] = torch.tensor([5.0, 4.0, 3.0, 2.5]), 4.5
    inputs = rows_of(a[None])
    wanted = expected(inputs, 4)

    def poison(*args) -> None:
        others = torch.ones(140, dtype=torch.bool)
        others[group] = False
        args[1][others] = NAN

    monkeypatch.setattr(select, "_topk_encode_repair_kernel", Watched(select._topk_encode_repair_kernel, poison))
    assert_same(encode(inputs, 4), wanted)


def test_rows_of_the_list_are_exact_when_every_row_is_on_it(listed: list[int], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(select, "REPAIRING", 3)  # fewer programs than rows: each takes several
    g = torch.Generator().manual_seed(2)
    a = torch.randint(-3, 4, (5, 190), generator=g).float()
    a[:, of_group(6)] += 20
    inputs = rows_of(a)
    for selection in SELECTIONS:
        assert_same(encode(inputs, 5, selection), expected(inputs, 5, selection))
    assert listed == [5] * 3


def test_the_layout_of_groups_is_the_one_that_is_read(monkeypatch: pytest.MonkeyPatch):
    """kept, from its description: the three best of every group of fp32 values that are all different."""
    a = torch.randperm(256, generator=torch.Generator().manual_seed(3)).float()[None] - 100
    found = []
    monkeypatch.setattr(
        select, "_topk_encode_select_kernel", Watched(select._topk_encode_select_kernel, lambda *b: found.append(b[0]))
    )
    encode(rows_of(a), 3, blocks=WIDE)
    for group in range(16):
        values = a[0, of_group(group, stretches=2)]
        for plane, place in enumerate(values.argsort(descending=True)[:3].tolist()):
            bits = int(found[0][0, plane, group])
            assert bits & 15 == place
            cut = int(found[0][0, 3 + place // 8, group]) >> 4 * (place % 8) & 15
            assert struct.unpack("f", struct.pack("i", (bits & -16) | cut))[0] == values[place]


# ----------------------------------------------------------------------------------------------------- chunks


@pytest.fixture
def little_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for 16 rows of 64 latents or so."""
    monkeypatch.setattr(tiles, "LEAST_ROWS", 16)
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 16 * (64 * 2 + 8 * 16))


@pytest.mark.parametrize("selection", ["relu", "signed"])
def test_chunks_of_latents_and_rows_give_one_answer(little_scratch: None, listed: list[int], selection: str):
    inputs = integers(18, 5, 150)
    assert_same(encode(inputs, 6, selection), expected(inputs, 6, selection))
    assert len(listed) == 3  # 64, 64 and 22 latents of all rows, which were multiplied 16 and 2 at a time


@pytest.mark.parametrize("chunked", [False, True], ids=["all latents", "chunks of latents"])
def test_rows_that_follow_take_the_scratch_of_those_before(
    chunked: bool, request: pytest.FixtureRequest, listed: list[int], monkeypatch: pytest.MonkeyPatch
):
    """Ties without end, so that every part has rows on its list."""
    if chunked:
        request.getfixturevalue("little_scratch")
    monkeypatch.setattr(topk, "MOST_ROWS", 6)
    inputs = integers(20, 5, 200, seed=2)
    assert_same(encode(inputs, 6), expected(inputs, 6))
    assert len(listed) >= 4


def test_nan_of_one_chunk_is_nan_whatever_the_others_hold(little_scratch: None):
    for latent in (3, 100, 269):
        a = torch.randn(3, 270, generator=torch.Generator().manual_seed(latent))
        a[1, latent] = NAN
        inputs = rows_of(a)
        wanted = reference(torch.ones(3, 1), torch.zeros(270, 1), torch.zeros(270), torch.zeros(1), 4, "raw")
        values, indices = encode((inputs[0], inputs[1], inputs[2], inputs[3]), 4)
        assert values[1].isnan().all()
        assert indices[1].tolist() == wanted[1][1].tolist() == [0, 1, 2, 3]


def test_later_chunks_have_no_more_suspects_than_reach_the_k_th_so_far(little_scratch: None, listed: list[int]):
    a = torch.linspace(-2, -1, 256)[None].clone()
    a[0, :8] = torch.arange(8.0) + 1  # of the first chunk
    a[0, of_group(4)[:3]] = torch.tensor([0.5, 0.4, 0.3])  # three of a group, all below the k-th
    inputs = rows_of(a)
    assert_same(encode(inputs, 5), expected(inputs, 5))
    assert listed[1:] == [0, 0, 0]


def test_scratch_is_bounded(monkeypatch: pytest.MonkeyPatch):
    """At published shapes, on tensors without data: of everything a call allocates but its results."""
    for kernel, module in (("_topk_encode_product_kernel", groups), ("_encoder_bias_kernel", product),
                           ("_topk_encode_select_kernel", select), ("_topk_encode_repair_kernel", select)):  # fmt: skip
        monkeypatch.setattr(module, kernel, Recorded([], kernel))
    made: list[int] = []
    new_empty = Tensor.new_empty
    monkeypatch.setattr(
        Tensor, "new_empty", lambda x, *size, **o: (made.append((t := new_empty(x, *size, **o)).nbytes), t)[1]
    )
    for rows, d, n, k in ((4096, 1280, 20480, 32), (4096, 768, 524288, 64), (1, 768, 524288, 64), (70000, 768, 3072, 8),
                          (300, 1281, 20480, 32), (4096, 3072, 65536, 64)):  # fmt: skip
        made.clear()
        inputs = tuple(torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((rows, d), (n, d), n, d))
        topk.topk_encode_triton(*inputs, k, "relu")
        results, bias, scratch = sum(made[:2]), made[2], made[3:]
        assert results == 8 * rows * k
        assert bias == 4 * n
        assert len(scratch) == 4  # for 8192 rows at most, which others take after them
        assert sum(scratch) <= 64 << 20, (rows, d, n, k)


# The last is how these tests poison what is allocated.
NO_LAUNCH = ("aten::new_empty", "aten::slice", "aten::detach", "aten::fill_")


class Recorded:
    def __init__(self, launched: list[tuple[str, int]], name: str):
        self.launched, self.name = launched, name

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **options: self.launched.append((self.name, grid[0]))


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_launches_at_few_rows_none_of_which_the_host_waits_for(
    dtype: torch.dtype, kept: bool, monkeypatch: pytest.MonkeyPatch
):
    """The launcher runs on tensors that have no data: any value it asked for would be an error. Nothing else is
    computed: what torch would launch is counted too."""
    launched: list[tuple[str, int]] = []
    for module in (groups, select, product):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorded(launched, name))
    sizes = ((256, 1280), (20480, 1280), (20480,), (1280,))
    inputs = tuple(torch.empty(size, dtype=dtype, device="meta") for size in sizes)
    bias = torch.empty(20480, device="meta") if kept else None

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket._qualified_op_name not in NO_LAUNCH:
                launched.append((str(func), 1))
            return func(*args, **(kwargs or {}))

    with Counted():
        topk.topk_encode_triton(*inputs, 32, "relu", bias=bias)
    assert [name for name, _ in launched if name.startswith("_topk")] == [
        "_topk_encode_product_kernel", "_topk_encode_select_kernel", "_topk_encode_repair_kernel",
    ]  # fmt: skip
    assert len(launched) == (3 if kept or dtype == torch.float32 else 4)


# ------------------------------------------------------------------------------------------------- inputs as they come


def test_zero_rows():
    _, W, b, c = integers(1, 6, 40)
    values, indices = encode((torch.zeros(0, 6, device=DEVICE), W, b, c), 5)
    assert values.shape == indices.shape == (0, 5)


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    x, W, b, c = problem(3, 8, 150, torch.float32, DEVICE)
    assert tiles.Operands.of(x, W, SMALL).constants["DESCRIBED"]  # through descriptors
    strided = (
        x.repeat_interleave(2, 1)[:, ::2],
        W.T.contiguous().T,
        b.repeat_interleave(3)[::3],
        c.repeat_interleave(2)[::2],
    )
    assert not any(t.is_contiguous() for t in strided)
    assert not tiles.Operands.of(*strided[:2], SMALL).constants["DESCRIBED"]  # by pointers
    assert all(torch.equal(a, e) for a, e in zip(encode(strided, 4), encode((x, W, b, c), 4), strict=True))
    one = x[:1].expand(4, 8)  # rows that are one row
    assert torch.equal(encode((one, W, b, c), 4)[0], encode((x, W, b, c), 4)[0][:1].expand(4, 4))


def test_the_same_bits_every_time():
    inputs = problem(5, 9, 160, torch.float32, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(encode(inputs, 6), encode(inputs, 6), strict=True))


def test_shapes_that_are_left_to_plain_torch():
    assert topk.selects(20480, 32)
    assert topk.selects(524288, 64)
    assert topk.selects(3072, 32)
    assert not topk.selects(5120, 160)
    assert not topk.selects(18432, 922)
    assert not topk.selects(512, 32)


def test_products_in_six_parts_are_within_the_bound_of_ieee_sums():
    """What `bf16x6` computes, made of bf16 parts in torch, of factors whose parts are as large as they can be."""

    def parts(t: Tensor) -> list[Tensor]:
        found = []
        for _ in range(3):
            found.append(t.bfloat16().float())
            t = t - found[-1]
        return found

    g = torch.Generator().manual_seed(5)
    for scale in (1.0, 2.0**60, 2.0**-50):
        x, w = (torch.randn(64, 1024, generator=g) * scale ** (1 - i) for i in range(2))
        for t in (x, w):  # mantissas of ones, where the parts left out are largest
            t.copy_(((t.view(torch.int32) & ~0x7FFFFF) | torch.randint(0x7FF000, 0x800000, t.shape, generator=g,
                                                                      dtype=torch.int32)).view(torch.float32))  # fmt: skip
        (xh, xm, xl), (wh, wm, wl) = parts(x), parts(w)
        got = sum((a.double() * b.double()) for a, b in ((xl, wh), (xh, wl), (xm, wm), (xm, wh), (xh, wm), (xh, wh)))
        exact = x.double() * w.double()
        assert ((got - exact).abs() <= 2.0**-25 * exact.abs()).all()  # leaves half of a sum's 2^-24 a product
