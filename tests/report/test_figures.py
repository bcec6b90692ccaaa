"""Pictures: what is bright, what size it has, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sparsefeat.report import contact_sheet, enlarge, overlay


def lightness(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L"), dtype=np.float64)


def drawing(width: int = 64, height: int = 64, seed: int = 5) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_the_overlay_is_brightest_where_the_map_is_highest() -> None:
    values = np.zeros((7, 5))
    values[1, 3] = 2.5
    light = lightness(overlay(Image.new("RGB", (60, 84), "white"), values))
    y, x = np.unravel_index(light.argmax(), light.shape)
    assert (y * 7 // light.shape[0], x * 5 // light.shape[1]) == (1, 3)
    assert light[-40:].max() < 150 < 200 < light.max()  # the rest stays dim, though the image is white


def test_the_overlays_lightness_grows_with_the_map() -> None:
    for shade in ("black", "gray", "white"):
        light = lightness(overlay(Image.new("RGB", (64, 64), shade), np.linspace(-3, 7, 33)[None].repeat(3, 0)))
        row = light[light.shape[0] // 2]
        assert (np.diff(row) >= -1).all()  # one step of rounding
        assert row[-1] > row[0] + 80


def test_a_constant_map_shows_the_dimmed_image_alone() -> None:
    image = drawing()
    zero, seven = overlay(image, np.zeros((4, 4))), overlay(image, np.full((3, 9), 7.0))
    assert np.array_equal(np.asarray(zero), np.asarray(seven))
    assert lightness(zero).max() < 150


def test_the_overlay_takes_tensors_of_any_type() -> None:
    values = torch.rand(6, 9, generator=torch.Generator().manual_seed(2)).bfloat16().requires_grad_()
    expected = overlay(drawing(), values.detach().float().numpy())
    assert np.array_equal(np.asarray(overlay(drawing(), values)), np.asarray(expected))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (np.array([[1.0, np.inf]]), "infinity"),
    ],
)
def test_a_wrong_map_is_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay(drawing(), values)


def test_enlarging_repeats_pixels_or_keeps_a_large_image() -> None:
    small = drawing(7, 5)
    grown = np.asarray(enlarge(small, side=20, resampling="nearest"))
    assert np.array_equal(grown, np.asarray(small).repeat(3, 0).repeat(3, 1))
    assert enlarge(small, side=20).size == (21, 15)
    large = drawing(300, 20)
    assert np.array_equal(np.asarray(enlarge(large)), np.asarray(large))


def test_transparent_pixels_become_white() -> None:
    image = Image.new("RGBA", (3, 3), (255, 0, 0, 0))
    image.putpixel((1, 1), (10, 20, 30, 255))
    shown = enlarge(image, side=3)
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 1)) == (10, 20, 30)


def test_the_contact_sheet_holds_every_image_in_its_place() -> None:
    colors = [["#ff0000", "#00ff00"], ["#0000ff"]]
    rows = [[Image.new("RGB", (5, 5), color) for color in row] for row in colors]
    sheet = contact_sheet(rows, ["", ""], tile=48)
    margin, gap = 8, 4
    assert sheet.size == (2 * margin + 2 * 48 + gap, 2 * margin + 2 * 48 + gap)
    centres = {(i, j): (margin + j * (48 + gap) + 24, margin + i * (48 + gap) + 24) for i in (0, 1) for j in (0, 1)}
    assert [sheet.getpixel(centres[at]) for at in ((0, 0), (0, 1), (1, 0), (1, 1))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_labels_stand_beside_the_images_and_not_on_them() -> None:
    row = [Image.new("RGB", (64, 64), "white")] * 3
    plain = contact_sheet([row, row], ["", ""])
    sheet = contact_sheet([row, row], ["before", "a long label that must be wrapped over lines"])
    assert sheet.width > plain.width
    assert sheet.height == plain.height
    corner = sheet.crop((sheet.width - plain.width + 20, 20, *sheet.size))
    assert np.array_equal(np.asarray(corner), np.asarray(plain.crop((20, 20, *plain.size))))
    assert lightness(sheet)[:, : sheet.width - plain.width].min() < 60  # ink
    assert lightness(sheet)[0].min() == lightness(sheet)[:, 0].min() == 255  # nothing is cut off


def test_captions_stand_under_their_images_and_make_room_for_themselves() -> None:
    rows = [[Image.new("RGB", (64, 64), "white")] * 3, [Image.new("RGB", (64, 64), "white")]]
    captions = [["", "two words", ""], ["a caption that is too long for one line"]]
    plain = contact_sheet(rows, ["", ""], tile=64)
    sheet = contact_sheet(rows, ["", ""], captions, tile=64)
    assert sheet.width == plain.width
    light = lightness(sheet)
    margin, gap, tile = 8, 4, 64
    first = light[margin + tile + 1 : margin + tile + 14]
    assert first[:, margin + tile + gap : margin + 2 * tile + gap].min() < 100  # under the second image
    assert (
        first[:, margin : margin + tile].min() == first[:, margin + 2 * (tile + gap) :].min() == 255
    )  # not its neighbours
    assert lightness(sheet)[-1].min() == 255  # nothing is cut off
    assert sheet.height - plain.height > 35  # one line, and at least two


@pytest.mark.parametrize(
    ("rows", "labels", "captions", "message"),
    [
        ([], [], None, "rows holds no image"),
        ([[], []], ["", ""], None, "rows holds no image"),
        ([[1]], ["a", "b"], None, "labels has 2 entries for 1 rows"),
        ([[1, 2], [3]], ["a", "b"], [["x", "y"]], r"captions has rows of \[2\] for images in rows of \[2, 1\]"),
    ],
)
def test_a_sheet_that_does_not_add_up_is_refused(rows: list, labels: list, captions: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet([[drawing(seed=n) for n in row] for row in rows], labels, captions)
