"""Images of EmojiCanvas prompts: what to draw, from which noise, and what the judge says of it.

Every image has its own seed, so it does not depend on what else is in its batch, and a method's image can be laid
beside the unedited one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.judge import Verdicts
from sparsefeat.measure.machine import draw_precision

# Splits: which noise. Nothing that was chosen or fitted on one is measured on it.
STATISTICS, VALIDATION, TEST = 0, 1, 2


class Drawn(Protocol):
    """What can be drawn: a prompt, and the seed of its noise."""

    @property
    def prompt(self) -> str: ...
    @property
    def seed(self) -> int: ...


One = TypeVar("One", bound=Drawn)


@dataclass(frozen=True)
class Task:
    """One image to draw: `object` and `style` index EmojiCanvas' axes, `seed` is the noise's."""

    object: int
    style: int
    seed: int

    @property
    def prompt(self) -> str:
        return emojicanvas.prompt(emojicanvas.OBJECTS[self.object], emojicanvas.STYLES[self.style])


def task(object_index: int, style_index: int, split: int, repeat: int = 0) -> Task:
    """The task of a grid cell. `split`: STATISTICS, VALIDATION, TEST, or another number of your own."""
    cell = style_index * len(emojicanvas.OBJECTS) + object_index
    return Task(object_index, style_index, seed=1_000_000 * split + 1_000 * repeat + cell)


def held_out(t: Task) -> bool:
    """Whether the SAEs never saw this cell: see `emojicanvas.held_out`."""
    return emojicanvas.held_out(t.object, t.style)


def whole_grid(split: int, repeat: int = 0) -> list[Task]:
    """Every object in every style once."""
    return [task(o, s, split, repeat) for s in range(len(emojicanvas.STYLES)) for o in range(len(emojicanvas.OBJECTS))]


@torch.no_grad()
def generate(
    pipe: Any,
    tasks: Sequence[One],
    *,
    n_steps: int,
    guidance: float,
    batch: int = 50,
    negative_prompt: str | None = None,
    worded: Callable[[One], str] = operator.attrgetter("prompt"),
    during: Callable[[Sequence[One]], AbstractContextManager] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> Tensor:
    """Draw the tasks: float32 [n, 3, h, w] in [0, 1].

    `worded(task)` is what the pipeline is asked for, the task's own prompt where nothing else is said.
    `during(tasks)` opens a context (an `attach`, say) around each call of the pipeline; `on_batch(n)` hears how many
    images each call drew.
    """
    drawn = []
    for start in range(0, len(tasks), batch):
        chunk = tasks[start : start + batch]
        generators = [torch.Generator().manual_seed(t.seed) for t in chunk]
        with draw_precision(), during(chunk) if during is not None else nullcontext():
            images = pipe(
                [worded(t) for t in chunk],
                num_inference_steps=n_steps,
                guidance_scale=guidance,
                generator=generators,
                negative_prompt=None if negative_prompt is None else [negative_prompt] * len(chunk),
                output_type="pt",
            ).images
        drawn.append(images.float().cpu())
        if on_batch is not None:
            on_batch(len(chunk))
    return torch.cat(drawn)


@dataclass(frozen=True)
class Accuracy:
    """How often the judge agrees with the prompt, as shares of 1."""

    object: float
    style: float
    n_images: int


def accuracy(verdicts: Verdicts, tasks: Sequence[Task]) -> Accuracy:
    objects = torch.tensor([t.object for t in tasks])
    styles = torch.tensor([t.style for t in tasks])
    return Accuracy(
        object=(verdicts.objects == objects).float().mean().item(),
        style=(verdicts.styles == styles).float().mean().item(),
        n_images=len(tasks),
    )
