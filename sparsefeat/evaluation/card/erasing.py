"""Erasers × {UA, IRA, CRA, their mean, ERB, Fréchet, time}, and the same words in other sentences.

    UA   share of the target's images that the judge no longer takes for it
    IRA  share of other images on which the judge names the right one of the target's kind; CRA: of the other kind, all images
    ERB  2 A_er A_adj / (A_er + A_adj), FADE's balance (arXiv 2503.19783): A_er = UA, A_adj = the judge's accuracy on images of the
         five nearest concepts
    share of possible: the mean of UA, IRA and CRA over (1 + IRA + CRA of the unedited pipeline) / 3
    Fréchet: of the images that should stay, from real drawings
    paraphrased UA: UA where the prompt names the target in other words
    time: processor seconds of an image, those of making the edit left out, over the unedited pipeline's

Settings are chosen on validation noise by the mean of UA, IRA and CRA; everything is reported on test noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.bench import Bench, unit_tasks
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.card.erasers import Eraser
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target, scores, tasks_for
from sparsefeat.evaluation.generation import VALIDATION, Task
from sparsefeat.evaluation.intervals import RESAMPLES, around, interval, resampled, share_draws
from sparsefeat.evaluation.judge import Verdicts

Setting = Mapping[str, Any]
ETA = 1e-12
"""Keeps ERB's quotient finite where both its parts are 0."""


def erb(erased: Tensor, adjacent: Tensor) -> Tensor:
    """FADE's Erasing-Retention Balance, the harmonic mean of the two accuracies (shares of 1)."""
    return 2 * erased * adjacent / (erased + adjacent + ETA)


def paraphrase(target: Target, which: int, t: Task) -> str:
    """The task's prompt in other words (two ways) that name the target, in which the unedited pipeline draws it too."""
    name, style = emojicanvas.words(emojicanvas.OBJECTS[t.object]), emojicanvas.STYLES[t.style]
    if which:
        return f"a {style} emoji of {name} {name}"
    return f"a {name}" if target.kind == OBJECT else f"a {style} {t.prompt.removeprefix('a ')}"


class Unit(NamedTuple):
    """What the judge said of one target's images: bool [n] each, and the features of the images that should stay."""

    gone: Tensor
    own: Tensor
    cross: Tensor
    adjacent: Tensor
    paraphrased: Tensor
    features: Tensor


def path_of(eraser: Eraser, target: Target, setting: Setting, part: str) -> str:
    """Key of a part; the setting is in it, so that no other setting's images are taken for this one's."""
    how = ",".join(f"{k}={v}" for k, v in sorted(setting.items())) or "plain"
    return f"erasers/{eraser.name.replace(' ', '-')}/{target.kind}-{target.name}/{how}/{part}"


def right(verdicts: Verdicts, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """bool [n] of objects, and of styles, that the judge names as the prompts do."""
    return (
        verdicts.objects == torch.tensor([t.object for t in tasks]),
        verdicts.styles == torch.tensor([t.style for t in tasks]),
    )


class Erasing:
    """One eraser on the bench: its chosen settings, its edits and its images."""

    def __init__(self, bench: Bench, eraser: Eraser, chosen: Mapping[str, Mapping[str, Setting]]) -> None:
        self.bench: Bench = bench
        self.eraser: Eraser = eraser
        self._edits: dict[str, Edit] = {}
        self._made: dict[str, float] = {}
        self.chosen: dict[str, Setting] = {}
        for kind in (OBJECT, STYLE):
            targets = [t for t in bench.budget.targets if t.kind == kind]
            if targets:
                self.chosen[kind] = chosen[eraser.like][kind] if eraser.like else self._choose(targets)

    def edit(self, target: Target) -> Edit:
        """The edit of the chosen setting, made once."""
        return self._edit(target, self.chosen[target.kind])

    def _edit(self, target: Target, setting: Setting) -> Edit:
        key = path_of(self.eraser, target, setting, "")
        if key not in self._edits:
            self._edits[key] = self.eraser.make(self.bench, target, **setting)
        return self._edits[key]

    def _choose(self, targets: Sequence[Target]) -> Setting:
        settings = self.eraser.settings[: self.bench.budget.n_settings]
        if len(settings) == 1:
            return settings[0]
        return max(settings, key=lambda setting: self._validated(targets, setting))

    def _validated(self, targets: Sequence[Target], setting: Setting) -> float:
        n, total = self.bench.budget.n_validation, 0.0
        for target in targets:
            tasks = tasks_for(target, VALIDATION, n, n)
            key = path_of(self.eraser, target, setting, "validation")
            said, seconds = self.bench.verdicts(key, tasks, partial(self._edit, target, setting))
            self._made[path_of(self.eraser, target, setting, "")] = seconds["made"]
            total += scores(said, target, tasks).mean
        return total / len(targets)

    def unit(self, target: Target) -> tuple[Unit, dict[str, float]]:
        """The target's images, and the processor seconds of one."""
        own, adjacent = unit_tasks(self.bench, target)
        setting = self.chosen[target.kind]
        key = path_of(self.eraser, target, setting, "test")
        said, seconds = self.bench.verdicts(key, [*own, *adjacent], lambda: self._edit(target, setting))
        n = len(own)
        objects, styles = right(said, [*own, *adjacent])
        mine, cross = (objects, styles) if target.kind == OBJECT else (styles, objects)
        shows = torch.tensor([target.shows(t) for t in own])
        other_words = [t for t, shown in zip(own, shows, strict=True) if shown]
        again = []
        for i in range(2):
            key = path_of(self.eraser, target, setting, f"paraphrase-{i}")
            heard, _ = self.bench.verdicts(
                key, other_words, lambda: self._edit(target, setting), worded=partial(paraphrase, target, i)
            )
            again.append(~right(heard, other_words)[0 if target.kind == OBJECT else 1])
        unit = Unit(
            gone=~mine[:n][shows],
            own=mine[:n][~shows],
            cross=cross[:n],
            adjacent=mine[n:],
            paraphrased=torch.cat(again),
            features=said.features[:n][~shows],
        )
        before = self._made.get(path_of(self.eraser, target, setting, ""), 0.0)
        return unit, {**seconds, "made": max(before, seconds["made"])}


def measured(bench: Bench, eraser: Eraser, kind: str, units: Sequence[Unit]) -> list[Row]:
    """The rows of one eraser on the targets of one kind. Shares are means over targets of shares of images."""
    seed = tasks_for(bench.budget.targets[0], 2, 1, 0)[0].seed
    rows = []

    def add(metric: str, value: float, ci: tuple[float, float] | None, n: int) -> None:
        rows.append(Row("erasers", eraser.name, kind, metric, value, ci, n, seed))

    names = {"UA": "gone", "IRA": "own", "CRA": "cross", "adjacent": "adjacent", "paraphrased UA": "paraphrased"}
    parts = {metric: [getattr(unit, name) for unit in units] for metric, name in names.items()}
    exact = {m: torch.stack([p.double().mean() for p in parts[m]]) for m in parts}
    draws = {m: torch.stack([share_draws(p, 100 * i + j) for j, p in enumerate(parts[m])]) for i, m in enumerate(parts)}
    for metric in ("UA", "IRA", "CRA", "paraphrased UA"):
        n = sum(len(p) for p in parts[metric])
        add(metric, float(exact[metric].mean()), interval(draws[metric].mean(0)), n)
    n = sum(len(u.gone) + len(u.own) for u in units)
    for metric, combined in (("mean", _mean), ("ERB", lambda of: erb(of["UA"], of["adjacent"]))):
        many = n + sum(len(u.adjacent) for u in units) if metric == "ERB" else n
        add(metric, float(combined(exact).mean()), interval(combined(draws).mean(0)), many)
    features = torch.cat([u.features for u in units])
    value = bench.real_drawings.distance(features)
    again = resampled(features, bench.real_drawings.distance, times=RESAMPLES)
    add("Fréchet", value, around(value, again), len(features))
    return rows


def _mean(of: Mapping[str, Tensor]) -> Tensor:
    return (of["UA"] + of["IRA"] + of["CRA"]) / 3


def erasers_rows(bench: Bench, erasers: Sequence[Eraser]) -> tuple[list[Row], dict[str, Any], list[Erasing]]:
    """The rows of all erasers, the settings that validation chose, and the erasers with their edits."""
    rows: list[Row] = []
    chosen: dict[str, dict[str, Setting]] = {}
    erasings = []
    seconds: dict[str, dict[str, list[float]]] = {}
    for eraser in erasers:
        erasing = Erasing(bench, eraser, chosen)
        erasings.append(erasing)
        chosen[eraser.name] = erasing.chosen
        for kind in (OBJECT, STYLE):
            found = [erasing.unit(t) for t in bench.budget.targets if t.kind == kind]
            if not found:
                continue
            own = measured(bench, eraser, kind, [unit for unit, _ in found])
            rows += own
            seconds.setdefault(kind, {})[eraser.name] = [spent["image"] for _, spent in found]
            rows += _times(eraser, kind, seconds[kind], [spent["made"] for _, spent in found])
    rows += _of_possible(rows)
    return rows, json.loads(json.dumps(chosen)), erasings


def _times(eraser: Eraser, kind: str, seconds: Mapping[str, list[float]], made: list[float]) -> list[Row]:
    own = sum(seconds[eraser.name]) / len(seconds[eraser.name])
    rows = [
        Row("erasers", eraser.name, kind, metric, value, None, len(made), 0)
        for metric, value in (("seconds an image", own), ("seconds to make", sum(made) / len(made)))
    ]
    plain = seconds.get("unedited")
    if plain:
        ratio = own / (sum(plain) / len(plain))
        rows.append(Row("erasers", eraser.name, kind, "time", ratio, None, len(made), 0))
    return rows


def _of_possible(rows: Sequence[Row]) -> list[Row]:
    found = {(row.method, row.of, row.metric): row for row in rows}
    shares = []
    for (method, kind, metric), row in found.items():
        plain = [found.get(("unedited", kind, one)) for one in ("IRA", "CRA")]
        if metric != "mean" or None in plain or row.ci is None:
            continue
        possible = (1 + sum(one.value for one in plain if one and one.value is not None)) / 3
        value, ci = (row.value or 0) / possible, (row.ci[0] / possible, row.ci[1] / possible)
        shares.append(Row("erasers", method, kind, "of possible", value, ci, row.n, row.seed))
    return shares
