"""The EmojiCanvas erasure benchmark: UnlearnCanvas in miniature, on the embedded pipeline.

For each target (an object or a style): 20 images that should lose it and 40 that should keep everything. With the
judge's verdicts,

* UA  = share of the target's images no longer recognised as the target,
* IRA = accuracy of the target's own kind on the other images (objects when an object is erased),
* CRA = accuracy of the other kind on all images (styles when an object is erased),

as UnlearnCanvas defines them (arXiv 2402.11846), and the Fréchet distance of the images that should stay from real
drawings. Statistics, validation and test use different noise; hyperparameters are chosen on validation alone.

Every unit of work (one method, one target) is written as soon as it is drawn, so an interrupted run goes on where it
was. Metrics are computed from the stored verdicts, never stored themselves.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.before_after import BeforeAfter, before_after
from sparsefeat.evaluation.frechet import frechet_distance
from sparsefeat.evaluation.generation import TEST, VALIDATION, Task, generate, task, whole_grid
from sparsefeat.evaluation.judge import Judge, Verdicts, judge_images

TARGET_OBJECTS = tuple(i for i in range(len(emojicanvas.OBJECTS)) if i % 5 in (0, 2))  # 20 of the 50
TARGET_STYLES = tuple(range(len(emojicanvas.STYLES)))

OBJECT, STYLE = "object", "style"


@dataclass(frozen=True)
class Target:
    """What to erase: `kind` "object" or "style", and its index."""

    kind: str
    index: int

    @property
    def name(self) -> str:
        names = emojicanvas.OBJECTS if self.kind == OBJECT else emojicanvas.STYLES
        return names[self.index]

    @property
    def words(self) -> str:
        return emojicanvas.words(self.name)

    def shows(self, t: Task) -> bool:
        return (t.object if self.kind == OBJECT else t.style) == self.index


def all_targets() -> list[Target]:
    return [Target(STYLE, i) for i in TARGET_STYLES] + [Target(OBJECT, i) for i in TARGET_OBJECTS]


def tasks_for(target: Target, split: int, n_target: int = 20, n_other: int = 40) -> list[Task]:
    """The images of one unit: `n_target` that show the target, then `n_other` that do not, fixed for every method."""
    n_objects, n_styles = len(emojicanvas.OBJECTS), len(emojicanvas.STYLES)
    if target.kind == STYLE:
        cells = [(o, target.index) for o in TARGET_OBJECTS]
    else:
        cells = [(target.index, s) for s in range(n_styles)]
    shown = [task(*cells[i % len(cells)], split, repeat=i // len(cells)) for i in range(n_target)]
    others = [
        task(o, s, split)
        for s in range(n_styles)
        for o in range(n_objects)
        if (o if target.kind == OBJECT else s) != target.index
    ]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(target.index)).tolist()
    return shown + [others[i] for i in order[:n_other]]


def baseline_tasks() -> list[Task]:
    """Every test image there is: the whole grid, and the further images of the object targets."""
    return sorted(
        {*whole_grid(TEST), *(t for target in all_targets() for t in tasks_for(target, TEST))}, key=lambda t: t.seed
    )


@dataclass(frozen=True)
class Method:
    """A way to erase. `during(target)` opens the context around the pipeline's call; or a negative prompt is given."""

    name: str
    during: Callable[[Target], AbstractContextManager] | None = None
    negative_prompt: Callable[[Target], str] | None = None


@dataclass(frozen=True)
class Scores:
    """Shares of 1."""

    ua: float
    ira: float
    cra: float

    @property
    def mean(self) -> float:
        return (self.ua + self.ira + self.cra) / 3


def scores(verdicts: Verdicts, target: Target, tasks: Sequence[Task]) -> Scores:
    """UA, IRA and CRA of one unit."""
    objects = verdicts.objects == torch.tensor([t.object for t in tasks])
    styles = verdicts.styles == torch.tensor([t.style for t in tasks])
    own, cross = (objects, styles) if target.kind == OBJECT else (styles, objects)
    shows = torch.tensor([target.shows(t) for t in tasks])
    return Scores(
        ua=1 - own[shows].float().mean().item(),
        ira=own[~shows].float().mean().item(),
        cra=cross.float().mean().item(),
    )


class Ledger:
    """Verdicts by unit, in a folder: each unit a file, written whole and renamed into place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"the folder {folder} cannot be written ({error.strerror}); choose another --work") from None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def get(self, key: str) -> Verdicts | None:
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            state = load_file(path)
        except SafetensorError:
            path.unlink()  # half a file can only come from a broken disk: draw the unit again
            return None
        return Verdicts(state["objects"], state["styles"], state["features"].float())

    def put(self, key: str, verdicts: Verdicts) -> Verdicts:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(
            {"objects": verdicts.objects, "styles": verdicts.styles, "features": verdicts.features.half()}, partial
        )
        os.replace(partial, path)
        return verdicts


class EmojiBenchmark:
    """Draws and judges units, once each. `n_steps`, `guidance`: fixed for the whole benchmark."""

    def __init__(
        self, pipe: Any, judge: Judge, work: Path, *, n_steps: int, guidance: float, progress: bool = True
    ) -> None:
        self.pipe: Any = pipe
        self.judge: Judge = judge
        self.ledger: Ledger = Ledger(work)
        self.n_steps: int = n_steps
        self.guidance: float = guidance
        self.progress: bool = progress
        self._unedited: dict[Task, list[Tensor]] = {}

    def draw(self, tasks: Sequence[Task], during: Any = None, negative_prompt: str | None = None) -> Verdicts:
        images = generate(
            self.pipe,
            tasks,
            n_steps=self.n_steps,
            guidance=self.guidance,
            negative_prompt=negative_prompt,
            during=during,
            batch=60,
        )
        return judge_images(self.judge, images)

    def unit(self, method: Method, target: Target, tasks: Sequence[Task], split: str) -> Verdicts:
        """The verdicts of `method` on `target`, drawn if they are not on disk yet."""
        key = f"{split}/{method.name}/{target.kind}-{target.name}"
        known = self.ledger.get(key)
        if known is not None and len(known.objects) == len(tasks):
            return known
        during = method.during
        return self.ledger.put(
            key,
            self.draw(
                tasks,
                during=None if during is None else lambda _: during(target),
                negative_prompt=None if method.negative_prompt is None else method.negative_prompt(target),
            ),
        )

    def pooled(
        self, key: str, tasks: Sequence[Task], during: Callable[[], AbstractContextManager] | None = None
    ) -> Verdicts:
        """The verdicts on `tasks` in one piece, drawn 50 at a time and kept under `key`."""
        parts = []
        bar = tqdm(total=len(tasks), desc=key, disable=not self.progress)
        for start in range(0, len(tasks), 50):
            chunk = tasks[start : start + 50]
            verdicts = self.ledger.get(f"{key}/{start:04d}")
            if verdicts is None or len(verdicts.objects) != len(chunk):
                drawn = self.draw(chunk, during=None if during is None else lambda _: during())
                verdicts = self.ledger.put(f"{key}/{start:04d}", drawn)
            parts.append(verdicts)
            bar.update(len(chunk))
        bar.close()
        return Verdicts(
            torch.cat([p.objects for p in parts]),
            torch.cat([p.styles for p in parts]),
            torch.cat([p.features for p in parts]),
        )

    def unedited(self, tasks: Sequence[Task]) -> Verdicts:
        """The unedited pipeline's verdicts on test tasks: each image is drawn once and shared by all targets."""
        if not self._unedited:
            pool = baseline_tasks()
            verdicts = self.pooled("unedited", pool)
            columns = (verdicts.objects, verdicts.styles, verdicts.features)
            self._unedited = {t: row for t, *row in zip(pool, *columns, strict=True)}
        rows = [self._unedited[t] for t in tasks]
        return Verdicts(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def choose(self, candidates: Sequence[Method], targets: Sequence[Target]) -> tuple[Method, dict[str, float]]:
        """The candidate with the best mean of UA, IRA and CRA over `targets` on validation noise (6 target images and 6
        others each), and every candidate's mean."""
        means: dict[str, float] = {}
        for method in tqdm(candidates, desc="validation", disable=not self.progress):
            parts = []
            for target in targets:
                tasks = tasks_for(target, VALIDATION, n_target=6, n_other=6)
                parts.append(scores(self.unit(method, target, tasks, "validation"), target, tasks).mean)
            means[method.name] = statistics.fmean(parts)
        return max(candidates, key=lambda method: means[method.name]), means

    def row(self, name: str, kind: str, methods: dict[Target, Method | None], real: Tensor) -> dict[str, Any]:
        """One row of the table: means over the targets of `kind`. A method of None is the unedited pipeline.

        `before_after` counts the images of all targets together, beside the unedited pipeline's images of the same seeds.
        """
        parts: list[Scores] = []
        counts: list[BeforeAfter] = []
        kept: list[Tensor] = []
        n_images = 0
        chosen = [t for t in methods if t.kind == kind]
        for target in tqdm(chosen, desc=f"{name}, {kind}", disable=not self.progress):
            tasks = tasks_for(target, TEST)
            method = methods[target]
            verdicts = self.unedited(tasks) if method is None else self.unit(method, target, tasks, "test")
            parts.append(scores(verdicts, target, tasks))
            shows = [target.shows(t) for t in tasks]
            axis = "objects" if target.kind == OBJECT else "styles"
            wanted = torch.tensor([t.object if target.kind == OBJECT else t.style for t in tasks])
            before = self.unedited(tasks)
            counts.append(before_after(getattr(before, axis), getattr(verdicts, axis), wanted, shows))
            keeps = ~torch.tensor(shows)
            kept.append(verdicts.features[keeps])
            n_images += len(tasks)
        mean = {key: statistics.fmean(getattr(part, key) for part in parts) for key in ("ua", "ira", "cra")}
        return {
            "method": name,
            "target_kind": kind,
            **mean,
            "mean": statistics.fmean(mean.values()),
            "frechet": frechet_distance(torch.cat(kept), real),
            "n_targets": len(chosen),
            "n_images": n_images,
            "before_after": asdict(sum(counts[1:], counts[0])),
            "by_target": {t.name: asdict(p) for t, p in zip(chosen, parts, strict=True)},
        }


def real_features(judge: Judge) -> Tensor:
    """The judge's features of the 200 real drawings: the reference of the Fréchet distance."""
    return judge_images(judge, emojicanvas.load().on_white().reshape(-1, 64, 64, 3)).features


def allowed_mean(unedited: dict[str, Any]) -> float:
    """What erasure on this pipeline could reach at best: UA of 1, IRA and CRA as the unedited pipeline has them."""
    return (1 + unedited["ira"] + unedited["cra"]) / 3
