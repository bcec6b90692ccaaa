"""Images for the shell's user, and a word where an edit changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer


def draw_before_and_after(
    pipe: Any, prompt: str, call: Callable[[], dict[str, Any]], instruments: Sequence[Any], folder: Path
) -> None:
    """before.png and, with the instruments attached, after.png. call: the arguments, with noise drawn anew."""
    from sparsefeat.pipeline import attach
    from sparsefeat.pipeline.drawing import draw
    from sparsefeat.report import enlarge

    before = draw(pipe, prompt, call())
    with attach(pipe, *instruments):
        after = draw(pipe, prompt, call())
    for name, image in (("before", before), ("after", after)):
        enlarge(image).save(folder / f"{name}.png")
    if before.tobytes() == after.tobytes():
        typer.echo("warning: the edit changed nothing of this image; after.png is before.png", err=True)
