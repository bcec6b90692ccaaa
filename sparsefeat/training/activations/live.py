"""Training rows that never touch the disk: a pipeline draws a window of images, their rows are shuffled, trained on, gone.

Window w is of images `w n` to `(w + 1) n`, and batch b of window `b // batches_per_window`: an order that a run which goes on,
or has another number of ranks, finds again by drawing one window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.pipeline import Hookpoint, attach
from sparsefeat.training.activations.collect import CollectActivations, CollectedRows
from sparsefeat.training.activations.drawing import Drawing, check_rows
from sparsefeat.training.activations.rows import epoch_generator
from sparsefeat.training.objective.losses import Batch
from sparsefeat.training.ranks import Ranks


class PipelineRows:
    """Rows at `hookpoints` of one forward of the pipeline, as it draws the inputs of `drawing` over and over.

    window: images whose rows are in memory at once and shuffled among themselves, whole calls of `drawing.batch_size`; ranks
    share them. rows_per_image, steps_per_image, condition, dtype: see `CollectActivations`. targets: for transcoders, the
    hookpoints that have what is to be made of the rows at each of `hookpoints`: the outputs of modules whose inputs those are.
    """

    def __init__(
        self,
        drawing: Drawing,
        hookpoints: Sequence[Hookpoint | str],
        window: int = 64,
        *,
        rows_per_image: int | None = 64,
        steps_per_image: int | None = None,
        condition: str | None = "cond",
        dtype: torch.dtype = torch.float16,
        targets: Sequence[Hookpoint | str] = (),
    ) -> None:
        self.drawing = drawing
        self.hookpoints: tuple[Hookpoint, ...] = tuple(
            h if isinstance(h, Hookpoint) else Hookpoint.parse(h) for h in hookpoints
        )
        self.targets: tuple[Hookpoint, ...] = tuple(
            h if isinstance(h, Hookpoint) else Hookpoint.parse(h) for h in targets
        )
        if self.targets and len(self.targets) != len(self.hookpoints):
            raise ValueError(f"targets has {len(self.targets)} hookpoints for {len(self.hookpoints)}: give each one.")
        self.calls: int = -(-whole("window", window) // drawing.batch_size)
        self.kept: dict[str, Any] = {
            "rows_per_image": rows_per_image,
            "steps_per_image": steps_per_image,
            "condition": condition,
            "seed": drawing.seed,
            "dtype": dtype,
        }
        self._first: tuple[Ranks, list[_Window]] | None = None

    @property
    def images(self) -> int:
        """Of a window."""
        return self.calls * self.drawing.batch_size

    def origin(self, place: int) -> Mapping[str, Any]:
        kept = {name: str(given) if name == "dtype" else given for name, given in self.kept.items()}
        target = {"target": str(self.targets[place])} if self.targets else {}
        return {**self.drawing.origin, **kept, **target, "window": self.images}

    def check(self, batch_size: int) -> None:
        """How many rows a window has is known when one was drawn: `stream` looks."""

    def sample(self, place: int, n: int, seed: int, ranks: Ranks) -> Batch:
        """Of the first window."""
        return self._window(0, ranks)[place].sample(n, seed, ranks)

    def stream(self, batch_size: int, seed: int, start: int, ranks: Ranks) -> Iterator[list[Batch]]:
        counts = [window.n_rows for window in self._window(0, ranks)]
        per_window = min(counts) // batch_size
        if not per_window:
            raise ValueError(
                f"batch_size is {batch_size} but a window of {self.images} images has {min(counts)} rows: make it smaller, or "
                "the window larger"
            )
        number, skip = divmod(start, per_window)
        while True:
            windows = self._window(number, ranks)
            if [window.n_rows for window in windows] != counts:
                raise ValueError(
                    "images have different numbers of rows, which only a store can be of: collect them first."
                )
            of_each = [window.batches(batch_size, seed, number, range(skip, per_window)) for window in windows]
            yield from map(list, zip(*of_each, strict=True))
            number, skip = number + 1, 0

    def _window(self, number: int, ranks: Ranks) -> list[_Window]:
        if number == 0 and self._first is not None and self._first[0] == ranks:
            return self._first[1]
        if self.calls < ranks.world:
            raise ValueError(
                f"window has {self.images} images, {self.calls} calls, for {ranks.world} ranks: make it larger, so that each "
                "has one."
            )
        drawing, calls, first = self.drawing, ranks.part(self.calls), number * self.images
        start, stop = (first + call * drawing.batch_size for call in (calls.start, calls.stop))
        places = (*self.hookpoints, *self.targets)
        collect = CollectActivations(*places, **self.kept, first_image=start, max_bytes=2**62)
        with attach(drawing.pipe, collect):
            for _ in drawing.draw(start, stop, places):
                check_rows(collect, places)
        windows = []
        targets = self.targets or (None,) * len(self.hookpoints)
        for rows, target in zip(map(collect.collected, self.hookpoints), targets, strict=True):
            made = None if target is None else collect.collected(target)
            if made is not None and not torch.equal(rows.position, made.position):
                raise ValueError(f"{target} has other positions than its input: name the output of the same module.")
            before = ranks.gather(len(rows.rows))
            windows.append(_Window(rows, None if made is None else made.rows, sum(before), sum(before[: ranks.rank])))
        # The first one's rows are needed twice: for the start values, and to begin.
        self._first = (ranks, windows) if number == 0 else None
        return windows


@dataclass(frozen=True)
class _Window:
    """This rank's rows of a window, `n_rows` over all ranks, of which its first is number `first`."""

    rows: CollectedRows
    target: Tensor | None
    n_rows: int
    first: int

    def batches(self, batch_size: int, seed: int, window: int, numbers: range) -> Iterator[Batch]:
        order = torch.randperm(self.n_rows, generator=epoch_generator(seed, window))
        for number in numbers:
            own = self._own(order[number * batch_size : (number + 1) * batch_size])[1]
            target = None if self.target is None else self.target[own]
            yield Batch(self.rows.rows[own], target, self.rows.timestep[own])

    def sample(self, n: int, seed: int, ranks: Ranks) -> Batch:
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(seed))[:n]
        place, own = self._own(order)
        parts = [self.rows.rows, self.rows.timestep, *([] if self.target is None else [self.target])]
        found = ranks.gather((place, *(part[own] for part in parts)))
        place, rows, timestep, *target = (torch.cat(part) for part in zip(*found, strict=True))
        back = place.argsort()
        return Batch(rows[back], target[0][back] if target else None, timestep[back])

    def _own(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows of these numbers are here, and where."""
        own = numbers - self.first
        here = ((own >= 0) & (own < len(self.rows.rows))).nonzero().squeeze(-1)
        return here, own[here]
