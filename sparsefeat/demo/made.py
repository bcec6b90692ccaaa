"""What the demo has made so far, and how its pictures are drawn, judged and said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sparsefeat.assets import GUIDANCE, N_STEPS, emojicanvas
from sparsefeat.evaluation.emoji import OBJECT
from sparsefeat.evaluation.generation import Task, generate, task
from sparsefeat.evaluation.judge import Judge, Verdicts, shares
from sparsefeat.features import Examples, Statistics
from sparsefeat.features.progress import Progress
from sparsefeat.sae import SAE

# Shown on the page: noise of a split of its own, so that no statistic has seen it.
SPLIT = 3
# Images a call: the larger a piece of work, the fewer times a thread waits for one that serves another program.
BATCH = 100
SHOWN = ("fox", "octopus", "rocket", "pizza", "rose", "castle", "owl", "key")


@dataclass
class Demo:
    """What the demo has made so far: the page's `results` and its images by key.

    The first SAE is a whole block's, for features; then come those of cross-attentions, for erasure, and the
    text encoder's, for steering and erasure.
    """

    pipe: Any
    saes: list[SAE]
    judge: Judge
    progress: Progress
    results: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Image.Image] = field(default_factory=dict)

    def picture(self, key: str, image: Image.Image | Tensor) -> str:
        self.images[key] = as_image(image) if isinstance(image, Tensor) else image
        return key

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        self.progress.bar.set_description(name)
        yield
        self.results.setdefault("timings", []).append({"name": name, "seconds": time.perf_counter() - started})

    def sure_of(self, kind: str, concept: str, verdicts: Verdicts) -> Tensor:
        """[n]: how sure the judge is that it sees an object or a style, a share of 1."""
        objects, styles = shares(self.judge, verdicts)
        if kind == OBJECT:
            return objects[:, emojicanvas.OBJECTS.index(concept)]
        return styles[:, emojicanvas.STYLES.index(concept)]

    def draw(self, tasks: list[Task], **options: Any) -> Tensor:
        return generate(self.pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE, batch=BATCH, **options)


def as_image(pixels: Tensor) -> Image.Image:
    """float [3, h, w] in [0, 1] as a PIL image."""
    return Image.fromarray((pixels.permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy())


def at(name: str, style: str, repeat: int = 0) -> Task:
    return task(emojicanvas.OBJECTS.index(name), emojicanvas.STYLES.index(style), SPLIT, repeat)


@dataclass
class Grid:
    """What one pass over the whole grid gave: every object in every style."""

    tasks: list[Task]
    pixels: list[Tensor]
    statistics: dict[tuple[int, str], Statistics]
    """By the SAE's number and the kind of concept."""
    examples: dict[int, Examples]
    """By the SAE's number: of the block's and of the one that steers."""

    @property
    def choosing(self) -> Tensor:
        """The half of the images on which names are chosen: half of each object's and half of each style's."""
        return torch.tensor([(t.object + t.style) % 2 == 0 for t in self.tasks])


def call_of(t: Task) -> str:
    """The call that draws a task, as a user writes it."""
    return (
        f"pipe({t.prompt!r}, num_inference_steps={N_STEPS}, guidance_scale={GUIDANCE},\n"
        f"         generator=torch.Generator().manual_seed({t.seed}))"
    )


def said(verdicts: Verdicts, i: int) -> str:
    """What the judge takes image i for."""
    name = emojicanvas.words(emojicanvas.OBJECTS[int(verdicts.objects[i])])
    return f"{name}, {emojicanvas.STYLES[int(verdicts.styles[i])]}"
