"""resize_add_ against a matrix for each side in fp64, and against torch's own bicubic."""

import pytest
import torch
from sparsefeat_kernels import resize_add_
from sparsefeat_kernels.attention import resize
from sparsefeat_kernels.attention.resize import reference
from torch import Tensor
from torch.nn import functional as F

# m, t, h, w, height, width: enlarged, one side each way, made smaller, as it is, of one position
SHAPES = {
    "larger": (3, 2, 5, 7, 13, 21),
    "one side": (2, 3, 8, 3, 8, 11),
    "smaller": (2, 2, 9, 12, 4, 5),
    "same": (4, 2, 6, 5, 6, 5),
    "one": (1, 1, 1, 1, 3, 2),
}


def problem(shape, dtype, device) -> tuple[Tensor, Tensor, Tensor]:
    m, t, h, w, height, width = shape
    g = torch.Generator().manual_seed(m + h)
    maps = torch.randn(m, h, w, t, generator=g, dtype=torch.float64).to(dtype).to(device).permute(0, 3, 1, 2)
    sums = torch.randn(t, height, width, generator=g, dtype=torch.float64).to(dtype).to(device)
    return sums, maps, torch.linspace(-0.5, 2, m, device=device)


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_maps_are_resized_clamped_and_added(path: str, shape, dtype, weighted, clamp):
    sums, maps, weight = problem(shape, dtype, path)
    weight = weight if weighted else None
    expected = reference(sums.double(), maps.double(), None if weight is None else weight.double(), clamp)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-12
    before = sums.clone()
    resize_add_(sums, maps, weight, clamp)
    torch.testing.assert_close(sums.double(), expected, rtol=tolerance, atol=5 * tolerance)
    torchs = F.interpolate(maps, size=sums.shape[1:], mode="bicubic")
    torchs = torchs.clamp(min=0) if clamp else torchs
    torchs = torchs if weight is None else torchs * weight.to(dtype)[:, None, None, None]
    torch.testing.assert_close(sums, before + torchs.sum(0), rtol=1e-5, atol=1e-5)


def test_a_sum_of_strides_is_written_and_nothing_around_it(path: str):
    whole = torch.zeros(2, 9, 14, device=path)
    maps = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)).to(path)
    resize_add_(whole[:, 1:8, ::2], maps)
    expected = F.interpolate(maps, size=(7, 7), mode="bicubic")[0]
    torch.testing.assert_close(whole[:, 1:8, ::2], expected, rtol=1e-5, atol=1e-6)
    assert not whole[:, :, 1::2].any()


def test_many_tokens_are_taken_in_blocks(monkeypatch):
    monkeypatch.setattr(resize, "BLOCK_BYTES", 64)
    sums, maps, _ = problem((2, 5, 3, 4, 6, 8), torch.float32, "cpu")
    expected = reference(sums.double(), maps.double(), None, True)
    resize_add_(sums, maps, None, True)
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [resize.LONGEST_SIDE, resize.LONGEST_SIDE + 1])
def test_long_maps_go_by_torchs_own_resize(side: int):
    """Both sides of the border, beside the matrices in fp64."""
    sums, maps, _ = problem((2, 1, side, 3, 40, 5), torch.float32, "cpu")
    expected = reference(sums.double(), maps.double(), None, True)
    resize_add_(sums, maps, None, True)
    # torch's positions are fp32, off by side / 2^24; neighbours are up to 8 apart, and there are two maps
    torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=side * 2.0**-24 * 8 * 2)


def test_threads_and_none_give_the_same(monkeypatch):
    sums, maps, weight = problem((5, 7, 6, 4, 9, 10), torch.float32, "cpu")
    alone = sums.clone()
    resize_add_(alone, maps, weight, True)
    monkeypatch.setattr(resize, "CONDUCTED_BYTES", 0)
    resize_add_(sums, maps, weight, True)
    torch.testing.assert_close(sums, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_nan_stays_where_it_is(path: str, broken: float):
    maps = torch.zeros(1, 1, 8, 8, device=path)
    maps[0, 0, 0, 0] = broken
    sums = torch.zeros(1, 16, 16, device=path)
    resize_add_(sums, maps, None, True)
    assert not sums[0, 0, 0].isfinite()
    assert sums[0, 8:, 8:].isfinite().all()


def test_nothing_to_add_changes_nothing(path: str):
    sums = torch.ones(2, 3, 4, device=path)
    resize_add_(sums, torch.empty(0, 2, 5, 5, device=path))
    resize_add_(torch.empty(0, 3, 4, device=path), torch.empty(2, 0, 5, 5, device=path))
    assert (sums == 1).all()


@pytest.mark.parametrize(
    ("sums", "maps", "weight", "said"),
    [
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), None, r"maps must be \[m, t, h, w\]"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 3, 3, 4), None, r"sums must be \[3, height, width\]"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4).half(), None, "maps must be float32 or float64"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4).double(), None, "sums must have maps' dtype"),
        (torch.zeros(1, 3, 4).expand(2, 3, 4), torch.zeros(1, 2, 3, 4), None, "must not be expanded"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2, 0, 4), None, "at least one row and column"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(2), r"weight must have shape \(1,\)"),
        (torch.zeros(2, 3, 4), torch.zeros(1, 2, 3, 4), torch.ones(1).long(), "weight must be floating"),
    ],
)
def test_what_does_not_fit_is_named(sums, maps, weight, said):
    with pytest.raises((ValueError, TypeError), match=said):
        resize_add_(sums, maps, weight)
