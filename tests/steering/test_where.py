"""Windows of steps, signs of rows, and maps on grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.arguments import image_map
from sparsefeat.pipeline import Context, Hookpoint
from sparsefeat.pipeline.step_window import StepWindow
from sparsefeat.steering.where import condition_signs, mask_of_rows, on_grid

AT = Hookpoint("unet.mid_block.attentions.0")


def context(step=0, n_steps=10, **options):
    return Context(
        hookpoint=AT, step=step, n_steps=n_steps, fraction=None if step is None else step / n_steps, **options
    )


@pytest.mark.parametrize(
    ("steps", "n", "expected"),
    [
        (None, 4, [0, 1, 2, 3]),
        ((0.0, 0.5), 4, [0, 1]),
        ((0.5, 1.0), 5, [3, 4]),
        ((0, 1), 3, [0, 1, 2]),
        ((0.3, 0.7), 10, [3, 4, 5, 6]),
        ((0.1, 0.3), 10, [1, 2]),
        ([0, 3], 5, [0, 3]),
        (range(1, 3), 5, [1, 2]),
        ({4}, 5, [4]),
        (np.arange(1, 3), 5, [1, 2]),
        ([np.int64(2)], 5, [2]),
        (torch.tensor([0, 2]), 5, [0, 2]),
    ],
)
def test_a_window_holds_these_steps(steps, n, expected):
    window = StepWindow.parse(steps)
    assert [i for i in range(n) if window.contains(context(i, n))] == expected
    again = StepWindow.from_json(window.to_json())
    assert again == window


def test_two_windows_that_meet_share_no_step_and_leave_none_out():
    for n in range(1, 60):
        for bound in (0.1, 0.2, 0.3, 1 / 3, 0.7, 0.9):
            first, second = StepWindow.parse((0.0, bound)), StepWindow.parse((bound, 1.0))
            assert all(first.contains(context(i, n)) != second.contains(context(i, n)) for i in range(n))


def test_image_to_image_starts_within_the_schedule():
    late = Context(hookpoint=AT, step=0, n_steps=3, fraction=0.7)
    assert not StepWindow.parse((0.0, 0.5)).contains(late)
    assert StepWindow.parse((0.5, 1.0)).contains(late)


@pytest.mark.parametrize("steps", [(0.5, 0.2), (0.1,), (0, 3), (-0.1, 0.5), (True, False), ("a", "b")])
def test_a_bad_pair_of_fractions_is_refused_with_the_remedy(steps):
    with pytest.raises(ValueError, match=r"must be \(start, stop\) with 0 <= start < stop <= 1.*steps=\[0, 1, 2\]"):
        StepWindow.parse(steps)


@pytest.mark.parametrize("steps", [[], [-1], [0.5], 3, ["a"], [True]])
def test_bad_step_indices_are_refused_with_the_remedy(steps):
    with pytest.raises(ValueError, match="must be a list of step indices, counted from 0, or a tuple of two fractions"):
        StepWindow.parse(steps)


def test_a_window_means_nothing_before_the_schedule():
    with pytest.raises(ValueError, match="runs before the schedule; leave it out"):
        StepWindow.parse((0.0, 0.5)).contains(context(None))
    assert StepWindow.parse(None).contains(context(None))


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("cond", [0, 1, 0]),
        ("uncond", [1, 0, 0]),
        ("cond+uncond-", [-1, 1, 0]),
        ("both", [1, 1, 1]),
    ],
)
def test_t7_each_half_of_the_guidance_batch_has_its_sign(condition, expected):
    three = context(condition=("uncond", "cond", "perturbed"), prompt_index=(0, 0, 0), batch=3)
    assert condition_signs(condition, three).tolist() == expected


def test_maps_are_averaged_to_coarser_grids_and_interpolated_to_finer_ones():
    given = torch.arange(24.0).view(4, 6)
    assert torch.equal(on_grid(given, (4, 6)), given.flatten())
    torch.testing.assert_close(on_grid(given, (2, 3)), given.view(2, 2, 3, 2).mean((1, 3)).flatten())
    finer = on_grid(given, (8, 12))
    assert finer.shape == (96,)
    torch.testing.assert_close(finer.mean(), given.mean())
    assert torch.equal(on_grid(given, (2, 4, 6)), given.flatten().repeat(2))  # two frames
    torch.testing.assert_close(on_grid(torch.ones(3, 5, 7), (3, 9)), torch.ones(3, 27))
    torch.testing.assert_close(on_grid(torch.ones(5, 7), (9, 3)), torch.ones(27))


def test_every_row_gets_the_mask_of_its_image():
    two = context(condition=("uncond", "uncond", "cond", "cond"), prompt_index=(0, 1, 0, 1), grid=(1, 2), batch=4)
    masks = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
    assert mask_of_rows(masks, two, 2).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert mask_of_rows(masks, two, None).tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]  # the call does not say how many
    assert mask_of_rows(masks[0], two, 2).tolist() == [[1, 2]] * 4
    assert mask_of_rows(lambda c: torch.eye(4)[:, None, :2], two, 2).tolist() == torch.eye(4)[:, :2].tolist()
    assert mask_of_rows(None, two, 2) is None


def test_a_mask_of_another_shape_is_refused():
    two = context(condition=("uncond", "cond"), prompt_index=(0, 0), grid=(2, 2), batch=2)
    with pytest.raises(ValueError, match=r"mask has shape \[4\]; give \[height, width\]"):
        image_map("mask", torch.ones(4))
    with pytest.raises(ValueError, match=r"maps for 3 images; this call makes 1"):
        mask_of_rows(torch.ones(3, 2, 2), two, 1)
    with pytest.raises(ValueError, match=r"returned has shape \[3, 2, 2\].* the 2 batch rows"):
        mask_of_rows(lambda c: torch.ones(3, 2, 2), two, 1)
    text = context(None, condition=("cond",), prompt_index=(0,), batch=1, stream="text")
    with pytest.raises(ValueError, match="needs an image grid"):
        mask_of_rows(torch.ones(2, 2), text, 1)
