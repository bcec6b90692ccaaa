"""Images for the shell's user: none that is not one, and a word where an edit changed nothing."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from PIL import Image


def draw(pipe: Any, prompt: str, call: dict[str, Any]) -> Image.Image:
    """The first image of a call. ValueError where its numbers are none: diffusers would give a black image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            return pipe(prompt, **call).images[0]
        except RuntimeWarning:
            raise ValueError(
                "the image came out as NaN, numbers beyond all bounds; take smaller ones for the edit or for --guidance"
            ) from None


def draw_before_and_after(
    pipe: Any, prompt: str, call: Callable[[], dict[str, Any]], instruments: Sequence[Any], folder: Path
) -> None:
    """before.png and, with the instruments attached, after.png. call: the arguments, with noise drawn anew."""
    from sparsefeat.pipeline import attach
    from sparsefeat.report import enlarge

    before = draw(pipe, prompt, call())
    with attach(pipe, *instruments):
        after = draw(pipe, prompt, call())
    for name, image in (("before", before), ("after", after)):
        enlarge(image).save(folder / f"{name}.png")
    if before.tobytes() == after.tobytes():
        typer.echo("warning: the edit changed nothing of this image; after.png is before.png", err=True)
