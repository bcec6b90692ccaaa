"""A bar for work of several calls of a pipeline: it moves with every denoising step, not with every call."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from sparsefeat.pipeline import Call, Context, Instrument


def progress_bar(total: int, description: str, unit: str) -> tqdm[Any]:
    """On stderr; in a log, where every state of the bar becomes a line, it speaks every ten seconds. `TQDM_DISABLE=1`
    silences it."""
    return tqdm(
        total=total,
        desc=description,
        bar_format="{l_bar}{bar}| {n:.0f} of {total_fmt} " + unit + "{postfix} [{elapsed}<{remaining}]",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    )


class Progress(Instrument):
    """Instrument: counts the images of the calls it is attached in, each as the share of its steps that is done.

        with Progress(200, "fitting") as progress, attach(pipe, collect, progress):
            ...

    `images`: how many will be drawn in all.
    """

    def __init__(self, images: int, description: str):
        self.bar: tqdm[Any] = progress_bar(images, description, "images")
        self.drawn: int = 0
        """Images of completed calls."""
        self._now = 0

    def begin_call(self, call: Call) -> None:
        self._now = call.n_images or 1

    def end_step(self, context: Context) -> None:
        self._move_to(min(self.bar.n + self._now / (context.n_steps or 1), self.drawn + self._now))

    def end_call(self, call: Call) -> None:
        self.drawn += self._now
        self._move_to(self.drawn)

    def _move_to(self, images: float) -> None:
        self.bar.update(min(images, self.bar.total) - self.bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
