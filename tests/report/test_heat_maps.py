"""Sheets and films of heat maps."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.attention import HeatMap, HeatMaps
from sparsefeat.pipeline import attach
from sparsefeat.report import over_frames, over_steps, overlay, save_animation, sheet_by, words_sheet
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


@pytest.mark.parametrize(
    ("n", "latents", "of"),
    [(9, 3, [0, 1, 1, 1, 1, 2, 2, 2, 2]), (5, 5, [0, 1, 2, 3, 4]), (8, 2, [0, 1, 1, 1, 1, 1, 1, 1]), (6, 3, [0, 0, 1, 1, 2, 2]), (4, 1, [0] * 4)],
)  # fmt: skip
def test_each_frame_of_a_video_has_the_map_of_the_latent_frame_it_came_from(n, latents, of):
    values = torch.rand(latents, 4, 6, generator=torch.Generator().manual_seed(n))
    video = [Image.fromarray(np.full((32, 48, 3), 10 * i, dtype=np.uint8)) for i in range(n)]
    scaled = (values - values.min()) / (values.max() - values.min())
    found = over_frames(video, HeatMap(values, "fox"))
    assert len(found) == n
    for frame, one, at in zip(video, found, of, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(overlay(frame, scaled[at], limits=(0, 1))))
    as_array = np.stack([np.asarray(frame) for frame in video]) / 255
    again = over_frames(as_array, HeatMap(values, "fox"))
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(found, again, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("imageio_ffmpeg") is None, reason="an MP4 needs imageio-ffmpeg")
@pytest.mark.parametrize(("size", "seconds"), [((50, 34), 0.3), ((64, 48), 2.0)])
def test_an_mp4_has_the_frames_their_size_and_their_time(tmp_path, size, seconds):
    import imageio

    frames = [Image.new("RGB", size, (40 * i, 255 - 40 * i, 128)) for i in range(6)]
    path = save_animation(frames, tmp_path / "film.mp4", seconds)
    with imageio.get_reader(path) as film:
        told, seen = film.get_meta_data(), list(film.iter_data())
    assert told["size"] == size
    assert told["fps"] == pytest.approx(1 / seconds, abs=0.01)
    assert len(seen) == 6
    for frame, back in zip(frames, seen, strict=True):
        assert np.abs(np.asarray(frame, dtype=int) - back).mean() < 12  # lossy


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
    with pytest.raises(ValueError, match=r"heat is the map of an image, \[4, 4\]; lay it over one"):
        over_frames([PICTURE], HeatMap(torch.rand(4, 4), "fox"))
    with pytest.raises(ValueError, match="video has 1 frames and heat 2"):
        over_frames([PICTURE], HeatMap(torch.rand(2, 4, 4), "fox"))
    if importlib.util.find_spec("imageio") is None and importlib.util.find_spec("cv2") is None:
        with pytest.raises(ImportError, match="pip install imageio imageio-ffmpeg"):
            save_animation([PICTURE], tmp_path / "film.mp4")
