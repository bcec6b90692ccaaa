"""Sheets and films of heat maps."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.attention import HeatMaps
from sparsefeat.pipeline import attach
from sparsefeat.report import over_steps, overlay, save_animation, sheet_by, words_sheet
from tests.tiny import pixels, tiny_sd

PICTURE = Image.new("RGB", (64, 64), "white")


@pytest.fixture(scope="module")
def recorded():
    pipe = tiny_sd()
    maps = HeatMaps(keep=["layers", "steps"])
    with attach(pipe, maps) as run:
        pixels(pipe, "a fox and a cat", steps=11)
    return run[maps]


def test_a_sheet_of_words_has_the_picture_and_each_words_map(recorded):
    maps = {word: recorded.word(word).values for word in ("fox", "cat", "and")}
    one, many = words_sheet(PICTURE, maps), words_sheet(PICTURE, {str(i): maps["fox"] for i in range(7)})
    assert one.width > 3 * one.height  # four tiles in a row
    assert many.height > 1.8 * one.height  # eight in two rows


@pytest.mark.parametrize("by", ["step", "layer"])
def test_a_sheet_has_a_row_a_word_and_at_most_eight_columns(recorded, by):
    kept = recorded.steps if by == "step" else recorded.layers
    sheet = sheet_by(PICTURE, recorded, ["fox", "cat"], by)
    single = sheet_by(PICTURE, recorded, ["fox"], by)
    assert abs(sheet.width - single.width) < 10  # the labels beside the rows
    assert 1.7 * single.height < sheet.height < 2 * single.height
    assert len(kept) == (11 if by == "step" else 6)
    assert (sheet.width > 8 * 160) == (len(kept) >= 8)
    assert sheet.width < 11 * 160 + 200


def test_frames_are_scaled_alike_and_add_up_to_the_words_map(recorded, tmp_path):
    frames = over_steps(PICTURE, recorded, "fox")
    assert len(frames) == 11
    alone = torch.stack([recorded.word("fox", step=step).values for step in recorded.steps])
    means = alone.cumsum(0) / torch.arange(1, 12)[:, None, None]
    limits = float(means.min()), float(means.max())
    for frame, values in zip(frames, means, strict=True):
        wanted = overlay(PICTURE, (values - limits[0]) / (limits[1] - limits[0]), limits=(0, 1))
        assert np.array_equal(np.asarray(frame), np.asarray(wanted))
    path = save_animation(frames, tmp_path / "fox.gif", seconds=0.1)
    with Image.open(path) as film:
        assert film.n_frames == 11
        assert film.info["duration"] == 100
    single = over_steps(PICTURE, recorded, "fox", summed=False)
    assert not np.array_equal(np.asarray(single[-1]), np.asarray(frames[-1]))


def test_what_cannot_be_drawn_is_refused(recorded, tmp_path):
    pipe = tiny_sd()
    maps = HeatMaps()
    with attach(pipe, maps) as run:
        pixels(pipe, "a fox")
    with pytest.raises(ValueError, match=r"steps were not kept apart in this recording; record with HeatMaps\(keep="):
        sheet_by(PICTURE, run[maps], ["fox"], "step")
    with pytest.raises(ValueError, match="by='head' is not known"):
        sheet_by(PICTURE, recorded, ["fox"], "head")
    with pytest.raises(ValueError, match=r"an animation is a \.gif or an \.mp4"):
        save_animation([PICTURE], tmp_path / "film.avi")
    with pytest.raises(ValueError, match="frames is empty"):
        save_animation([], tmp_path / "film.gif")
    if importlib.util.find_spec("imageio") is None and importlib.util.find_spec("cv2") is None:
        with pytest.raises(ImportError, match="pip install imageio imageio-ffmpeg"):
            save_animation([PICTURE], tmp_path / "film.mp4")
