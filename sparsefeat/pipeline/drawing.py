"""One image of a pipeline, or a sentence where it is none."""

from __future__ import annotations

import warnings
from typing import Any

from PIL import Image


def draw(pipe: Any, prompt: str, call: dict[str, Any]) -> Image.Image:
    """The first image of a call; see `draw_all`."""
    return draw_all(pipe, prompt, call)[0]


def draw_all(pipe: Any, prompts: str | list[str], call: dict[str, Any]) -> list[Image.Image]:
    """The images of a call. ValueError where its numbers are none, of which diffusers would make a black image, and where
    the pipeline draws no images."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            drawn = pipe(prompts, **call)
        except RuntimeWarning:
            raise ValueError(
                "the image came out as NaN, numbers beyond all bounds; take smaller ones for the edit or for --guidance"
            ) from None
    images = getattr(drawn, "images", None)
    if not isinstance(images, list) or not all(isinstance(image, Image.Image) for image in images):
        raise ValueError(f"this call of a {type(pipe).__name__} gives no images; choose a pipeline that draws some")
    return images
