"""The pixel judge: what a label is, what mIoU is, and that the shipped one sees real scenes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.evaluation.pixel_judge import (
    BACKGROUND,
    label_pixels,
    labels_of,
    load_pixel_judge,
    mean_iou,
    pixel_judge_report,
)


def test_a_pixel_belongs_to_what_covers_most_of_it():
    masks = np.zeros((2, 1, 4), np.float32)
    masks[0, 0] = [1.0, 0.5, 0.2, 0.0]
    masks[1, 0] = [0.0, 0.4, 0.3, 0.0]
    assert labels_of(masks, (3, 7)).tolist() == [[3, 3, BACKGROUND, BACKGROUND]]  # 0.2, 0.3 against 0.5 of nothing


def test_mean_iou_is_the_mean_over_labels_that_occur():
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0, 4, BACKGROUND])[torch.randint(3, (2, 9, 7), generator=generator)]
    predicted = torch.where(torch.rand(true.shape, generator=generator) < 0.3, torch.tensor(9), true)
    expected = []
    for label in (0, 4, BACKGROUND):
        a, b = (true == label).numpy(), (predicted == label).numpy()
        expected.append((a & b).sum() / (a | b).sum())
    assert mean_iou(predicted, true) == pytest.approx(np.mean(expected))
    assert mean_iou(true, true) == 1.0


def test_a_missing_judge_is_told_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tools/train_pixel_judge\.py"):
        load_pixel_judge(tmp_path)


@pytest.mark.embedded
def test_the_shipped_judge_finds_the_objects_of_scenes_it_never_saw():
    """Other scenes than the report's, of held-out pairs: within 0.1 of what the report says, which 60 scenes allow."""
    scenes = emojiscenes.scenes(60, seed=77, split=emojiscenes.HELD_OUT)
    drawn = [emojiscenes.draw(scene) for scene in scenes]
    true = torch.stack([labels_of(one.masks, scene.objects) for one, scene in zip(drawn, scenes, strict=True)])
    predicted = label_pixels(load_pixel_judge(), np.stack([one.image for one in drawn]))
    assert mean_iou(predicted, true) > pixel_judge_report()["held_out_pairs_real"]["miou"] - 0.1
    nothing = torch.full_like(true, BACKGROUND)
    assert mean_iou(nothing, true) < 0.05
    single = emojicanvas.load()
    labels = label_pixels(load_pixel_judge(), single.on_white()[0])
    inside = [labels[i][torch.from_numpy(single.masks()[0, i] > 0.9)] for i in range(len(emojicanvas.OBJECTS))]
    assert np.mean([(found == i).float().mean().item() for i, found in enumerate(inside)]) > 0.7
