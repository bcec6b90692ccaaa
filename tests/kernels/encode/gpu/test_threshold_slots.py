"""threshold_encode on a GPU where slots do not suffice for all marked words: the same code, in few launches, in bounded memory."""

import pytest
import torch
from sparsefeat_kernels import force_triton, threshold_encode, threshold_encode_csr
from sparsefeat_kernels.dispatch import INTERPRETED, TRITON_AVAILABLE
from sparsefeat_kernels.encode import product
from sparsefeat_kernels.encode.gpu import threshold as kernels
from sparsefeat_kernels.encode.gpu import tiles
from torch import Tensor

from tests.kernels.encode.test_threshold import assert_csr_same, assert_same, expected, problem
from tests.kernels.launches import launches

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not (TRITON_AVAILABLE and INTERPRETED), reason="needs Triton's interpreter"
)
ROWS, D, N = 7, 5, 1300  # eleven tiles, of each of which nearly all 28 words are marked
WORDS_AND_STARTS = 4 * (ROWS * 11 * 4 + ROWS * 11)


def slots_of(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many for each of the four programs, of three tiles."""
    monkeypatch.setattr(kernels, "scratch_bytes", lambda: WORDS_AND_STARTS + 4 * 128 * number)


def starts_of(inputs: tuple[Tensor, ...]) -> Tensor:
    x, W, b_enc, b_pre, threshold = inputs
    (marked,) = kernels.marked_chunks(x, W, b_enc, b_pre, threshold, None, 4096, 1)
    assert marked.again is not None
    return marked.starts.view(ROWS, 11)


def without_slots(inputs: tuple[Tensor, ...], slots: int) -> list[bool]:
    """Of every tile, whether the program that takes each fourth had too few left for its words with an active latent."""
    active = torch.zeros(ROWS, 11 * 128, dtype=torch.bool)
    _, indices, counts = expected(inputs, N)
    for row in range(ROWS):
        active[row, indices[row, : counts[row]].long()] = True
    wanted, used, missed = active.view(ROWS, 11, 4, 32).any(3).sum((0, 2)).tolist(), [0] * 4, []
    for tile, words in enumerate(wanted):
        missed.append(used[tile % 4] + words > slots)
        used[tile % 4] += 0 if missed[-1] else words
    return missed


@pytest.mark.parametrize("slots", [8, 16, 32, 64])
def test_a_tile_without_slots_is_made_again(slots, monkeypatch):
    slots_of(slots, monkeypatch)
    inputs = problem(ROWS, D, N, torch.float32, "cpu")
    missed = starts_of(inputs) < 0
    assert missed.tolist() == [without_slots(inputs, slots)] * ROWS
    assert 0 < missed[0].sum() < 11
    with force_triton():
        for most in (500, 40):  # of which all rows have more
            assert_same(threshold_encode(*inputs, most), expected(inputs, most), 1e-4)
        assert_csr_same(threshold_encode_csr(*inputs), expected(inputs, N), 1e-4)


@pytest.mark.parametrize("latent", [0, 700, 1299])
def test_nan_in_a_tile_without_slots_breaks_its_row(latent, monkeypatch):
    slots_of(32, monkeypatch)
    inputs = problem(ROWS, D, N, torch.float32, "cpu")
    for place in ((1, latent), (0, 3)):  # a row of W, then one of x
        broken = [t.clone() for t in inputs]
        broken[place[0]][place[1]] = torch.nan
        with force_triton():
            assert_same(threshold_encode(*broken, 300), expected(broken, 300), 1e-4)
            values, _, offsets = threshold_encode_csr(*broken)
        assert offsets.diff().tolist() == expected(broken, N)[2].tolist()
        assert values.isnan().sum() == (ROWS if place[0] == 1 else 1)


@pytest.mark.parametrize("slots", [16, 1000])
def test_an_infinite_row_is_not_nan_for_latents_that_are_not_there(slots, monkeypatch):
    slots_of(slots, monkeypatch)
    x, W, b_enc, b_pre, threshold = (t.abs() for t in problem(ROWS, D, N, torch.float32, "cpu"))
    x[2, 1] = torch.inf
    inputs = x, W + 0.1, b_enc, b_pre, threshold
    with force_triton():
        assert_same(threshold_encode(*inputs, N), expected(inputs, N), 1e-4)


@pytest.mark.parametrize("slots", [1, 16])
def test_counts_go_on_in_chunks_of_latents_where_tiles_are_made_again(slots, monkeypatch):
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 64 * (3 * 128 // 8 + 3 * 4 + 128) + 100)  # three tiles of latents
    slots_of(slots, monkeypatch)
    inputs = problem(ROWS, D, N, torch.float32, "cpu")
    with force_triton():
        for most in (8, 500):
            assert_same(threshold_encode(*inputs, most), expected(inputs, most), 1e-4)


@pytest.mark.parametrize(("d", "n", "k"), [(1280, 20480, 32), (768, 32768, 64), (3072, 65536, 64)])
def test_published_shapes_have_few_launches_and_little_scratch(d, n, k, monkeypatch):
    """The bias, the product, what is made again, the compaction; 65,536 latents are two chunks."""
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    sizes = ((4096, d), (n, d), (n,), (d,))
    x, W, b_enc, b_pre = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    threshold, of_all = torch.empty(n, device="meta"), (x, W, b_enc, b_pre)
    with force_triton(), launches(monkeypatch, kernels, product) as launched:
        kernels.threshold_encode_triton(*of_all, threshold, 8 * k, None, tiles.LARGE_TILE)
    chunk = ["_threshold_encode_product_kernel", "_threshold_encode_again_kernel", "_threshold_encode_compact_kernel"]
    assert launched == ["_encoder_bias_kernel", *chunk * (2 if n > 40000 else 1)]
    marked = next(iter(kernels.marked_chunks(*of_all, threshold, None, 4096, k, tiles.LARGE_TILE)))
    held = marked.scratch.nbytes + marked.words.nbytes + marked.starts.nbytes
    assert held <= 60 << 20
    assert len(marked.scratch) // 32 >= 4096 * k  # slots: a latent of its own word each
