"""Pictures for people: an image enlarged, a map laid over an image, a labelled contact sheet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A 64-pixel drawing is shown about 170 CSS pixels wide; four times its size stays crisp on a high-density screen and
# costs about 5 kB as WebP.
DISPLAY_SIDE = 256

# The image under a map is dimmed to blue-greys, so that the map is the brightest thing and the drawing can still be
# recognised: the RGB of its black, and how far its white lies above that.
DIMMED_BLACK = (0.06, 0.07, 0.11)
DIMMED_RANGE = (0.44, 0.46, 0.50)

_RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}


def on_white(image: Image.Image) -> Image.Image:
    """The image as RGB, composited on white where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def enlarge(
    image: Image.Image, side: int = DISPLAY_SIDE, resampling: Literal["bicubic", "nearest"] = "bicubic"
) -> Image.Image:
    """The image as RGB, grown by the smallest whole factor that makes its longer side at least `side` pixels.

    An image that is large enough keeps its size. `nearest` shows the pixels themselves.
    """
    image = on_white(image)
    factor = -(-side // max(image.size))
    if factor <= 1:
        return image
    return image.resize((image.width * factor, image.height * factor), _RESAMPLING[resampling])


def overlay(image: Image.Image, map: Any, limits: tuple[float, float] | None = None) -> Image.Image:
    """The image, dimmed, with `map` [h, w] glowing over it, enlarged for display.

    `map` is anything `numpy.asarray` takes, on a grid of its own; it is scaled from its minimum to its maximum, or from
    `limits`, and enlarged bicubically. A constant map says nothing about where, and shows only the dimmed image. Colours are
    matplotlib's inferno, whose lightness grows evenly with the value. Raises ValueError on another rank, an empty map,
    NaN or infinity.
    """
    values = np.asarray(map.detach().cpu().float() if hasattr(map, "detach") else map, dtype=np.float32)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"map has shape {tuple(values.shape)}; give one map of shape [h, w]")
    if not np.isfinite(values).all():
        raise ValueError("map holds NaN or infinity; give finite values")
    base = enlarge(image)
    low, high = limits or (float(values.min()), float(values.max()))
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    grown = np.asarray(Image.fromarray(scaled).resize(base.size, Image.Resampling.BICUBIC)).clip(0, 1)

    lightness = np.asarray(base.convert("L"), dtype=np.float32)[..., None] / 255
    dimmed = np.asarray(DIMMED_BLACK) + lightness * np.asarray(DIMMED_RANGE)
    glow = matplotlib.colormaps["inferno"](grown)[..., :3]
    mixed = 1 - (1 - dimmed) * (1 - glow)  # the "screen" blend: light added to light, never above white
    return Image.fromarray((mixed.clip(0, 1) * 255).round().astype(np.uint8))


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships: the same picture on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """`text` with line breaks between words so that it fits `width` pixels where its words allow."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    tile: int = 160,
) -> Image.Image:
    """Rows of images on white, one label at the left of each row and, if given, a caption under each image.

    Every image is fitted into a square of `tile` pixels. Rows may differ in length.

        contact_sheet([[before, after]], ["erase “fox”"], [["before", "after"]]).save("erasure.png")

    Raises ValueError when there is no image, or when labels or captions do not match the rows.
    """
    if not any(len(row) for row in rows):
        raise ValueError("rows holds no image; give at least one")
    if len(labels) != len(rows):
        raise ValueError(f"labels has {len(labels)} entries for {len(rows)} rows; give one per row")
    n_columns = max(len(row) for row in rows)
    if captions is not None and [len(row) for row in captions] != [len(row) for row in rows]:
        raise ValueError(
            f"captions has rows of {[len(row) for row in captions]} for images in rows of {[len(row) for row in rows]}; "
            "give one for each image"
        )

    font, small = _font(max(11, tile // 10)), _font(max(10, tile // 12))
    gap, margin = max(4, tile // 16), max(8, tile // 8)
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    row_labels = [_wrapped(label, font, 1.4 * tile) for label in labels]
    under = [[_wrapped(text, small, tile) for text in row] for row in captions or [[] for _ in rows]]
    left = max((pen.multiline_textbbox((0, 0), text, font)[2] for text in row_labels if text), default=0)
    x0 = margin + round(left) + (gap * 2 if left else 0)
    below = [
        max((round(pen.multiline_textbbox((0, 0), text, small)[3]) + 2 for text in row if text), default=0)
        for row in under
    ]
    tops = [margin + i * (tile + gap) + sum(below[:i]) for i in range(len(rows))]
    size = (
        x0 + n_columns * (tile + gap) - gap + margin,
        margin + len(rows) * (tile + gap) - gap + sum(below) + margin,
    )
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)

    ink, line = "#1f2328", "#d9dce1"
    for y, row, text, texts in zip(tops, rows, row_labels, under, strict=True):
        for j, caption in enumerate(texts):
            place = (x0 + j * (tile + gap) + tile / 2, y + tile + 2)
            pen.multiline_text(place, caption, ink, small, anchor="ma", align="center")
        pen.multiline_text((x0 - gap * 2, y + tile / 2), text, ink, font, anchor="rm", align="right")
        for j, image in enumerate(row):
            x = x0 + j * (tile + gap)
            fitted = on_white(image)
            scale = tile / max(fitted.size)
            shape = (max(1, round(fitted.width * scale)), max(1, round(fitted.height * scale)))
            fitted = fitted.resize(shape, Image.Resampling.BICUBIC)
            sheet.paste(fitted, (x + (tile - fitted.width) // 2, y + (tile - fitted.height) // 2))
            pen.rectangle((x, y, x + tile - 1, y + tile - 1), outline=line)
    return sheet
