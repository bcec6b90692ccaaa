"""`sparsefeat evaluate emoji`: everything measured on the embedded pipeline, into one JSON file.

Generation, SAEs, erasure; in this order, each part kept as it is finished. The tables of docs/benchmarks.md are made from
the file this writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.assets import GUIDANCE, N_STEPS, embedded_fingerprint, emojicanvas
from sparsefeat.erasure import Erase, Exchange, random_latents
from sparsefeat.evaluation.emoji import (
    OBJECT,
    STYLE,
    EmojiBenchmark,
    Method,
    Target,
    all_targets,
    allowed_mean,
    real_features,
)
from sparsefeat.evaluation.generation import STATISTICS, TEST, Drawn, Task, accuracy, generate, held_out, whole_grid
from sparsefeat.evaluation.judge import Judge, judge_report
from sparsefeat.evaluation.results import measured_on_embedded
from sparsefeat.evaluation.sae_metrics import measure_sae, pca_fvu, random_control
from sparsefeat.evaluation.splice import Splice
from sparsefeat.features import CollectStatistics, Statistics
from sparsefeat.measure.machine import precision
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE
from sparsefeat.training import CollectActivations
from sparsefeat.whole import write_json


def activation_rows(
    pipe: Any, hookpoints: Sequence[str], tasks: Sequence[Drawn], rows_per_image: int | None = None
) -> list[Tensor]:
    """Conditional rows of all steps at each hookpoint while the tasks are drawn once, fp32 [n, d_model]."""
    collect = CollectActivations(*hookpoints, rows_per_image=rows_per_image, dtype=torch.float32)
    with attach(pipe, collect):
        generate(pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE)
    return [collect.collected(h).rows for h in hookpoints]


def collect_grid_statistics(
    pipe: Any, saes: Sequence[SAE], folder: Path | None = None
) -> dict[tuple[int, str], Statistics]:
    """Statistics of every SAE by object and by style over the whole grid: `[sae index, kind]`.

    Every image counts once for its object and once for its style; each kind is compared within itself.
    """
    names = {OBJECT: emojicanvas.OBJECTS, STYLE: emojicanvas.STYLES}
    keys = [(i, kind) for i in range(len(saes)) for kind in (OBJECT, STYLE)]
    paths = {} if folder is None else {key: folder / f"{key[1]}-{key[0]}" for key in keys}
    if paths and all((path / "statistics.json").is_file() for path in paths.values()):
        return {key: Statistics.load(path) for key, path in paths.items()}
    tasks = whole_grid(STATISTICS)
    by_prompt = {
        OBJECT: {t.prompt: emojicanvas.OBJECTS[t.object] for t in tasks},
        STYLE: {t.prompt: emojicanvas.STYLES[t.style] for t in tasks},
    }
    collected = {key: Statistics(names[key[1]], saes[key[0]].n_latents) for key in keys}
    instruments = [CollectStatistics(saes[i], collected[i, kind], by_prompt[kind]) for i, kind in keys]
    with attach(pipe, *instruments):
        generate(pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE)
    for key, path in paths.items():
        collected[key].save(path)
    return collected


CROSS_ATTENTIONS, TEXT_ENCODER = "cross-attentions", "text encoder"


def place_of(sae: SAE) -> str | None:
    """Where an SAE sits, of the places where erasure is tried."""
    at = str(sae.config.hookpoint)
    if at.startswith("text_encoder."):
        return TEXT_ENCODER
    return CROSS_ATTENTIONS if at.endswith(".attn2:output") else None


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one erasure: at which SAEs, how many latents a step and SAE, and how strongly (z' = gamma z)."""

    place: str
    n_latents: int
    gamma: float

    @property
    def name(self) -> str:
        return f"{self.place.replace(' ', '-')}-n{self.n_latents}-g{abs(self.gamma):g}"


@dataclass(frozen=True, eq=False)
class Eraser:
    """Builds the methods that are compared, from the SAEs, the place of each, and their statistics."""

    pipe: Any
    saes: Sequence[SAE]
    places: Sequence[str]
    collected: dict[tuple[int, str], Statistics]

    def at(self, recipe: Recipe) -> list[tuple[int, SAE]]:
        """The SAEs that a recipe edits, with their numbers."""
        return [(i, sae) for i, sae in enumerate(self.saes) if self.places[i] == recipe.place]

    def erases(self, target: Target, recipe: Recipe, error: str) -> list[Erase]:
        return [
            Erase.from_statistics(
                sae,
                self.collected[i, target.kind],
                target.name,
                n_latents=recipe.n_latents,
                gamma=recipe.gamma,
                magnitude="scale",
                error=error,
            )
            for i, sae in self.at(recipe)
        ]

    def saeuron(self, recipe: Recipe, error: str) -> Method:
        def during(target: Target) -> AbstractContextManager:
            return attach(self.pipe, *self.erases(target, recipe, error))

        return Method(f"saeuron-{error}/{recipe.name}", during=during)

    def exchange(self, n_latents: int) -> Method:
        """At the text encoder's SAE, each target for the concept that is most like it; kept, since fitting draws nothing."""
        (sae,) = (sae for sae, place in zip(self.saes, self.places, strict=True) if place == TEXT_ENCODER)
        fitted: dict[Target, Exchange] = {}

        def during(target: Target) -> AbstractContextManager:
            if target not in fitted:
                prompts = emojicanvas.prompts_by_concept(target.words)
                fitted[target] = Exchange.fit(self.pipe, sae, target.words, prompts, n_latents=n_latents)
            return attach(self.pipe, fitted[target])

        return Method(f"exchange/n{n_latents}", during=during)

    def random(self, recipe: Recipe) -> Method:
        def during(target: Target) -> AbstractContextManager:
            erases = zip(self.at(recipe), self.erases(target, recipe, "keep"), strict=True)
            chosen = [
                random_latents(erase, seed=target.index, statistics=self.collected[i, target.kind])
                for (i, _), erase in erases
            ]
            return attach(self.pipe, *chosen)

        return Method(f"random/{recipe.name}", during=during)


def negative_prompt() -> Method:
    return Method("negative-prompt", negative_prompt=lambda target: target.words)


# What validation chooses from, once for objects and once for styles.
EXCHANGE_LATENTS = (16, 32, 64)
RECIPES = (
    Recipe(CROSS_ATTENTIONS, 8, -2.0),
    Recipe(CROSS_ATTENTIONS, 16, -2.0),
    Recipe(TEXT_ENCODER, 16, -0.5),
    Recipe(TEXT_ENCODER, 24, -0.5),
    Recipe(TEXT_ENCODER, 32, -0.5),
)


def measure_generation(bench: EmojiBenchmark) -> dict[str, Any]:
    """Judge accuracy over the whole grid, one image a cell."""
    tasks = whole_grid(TEST)
    verdicts = bench.unedited(tasks)
    result = accuracy(verdicts, tasks)
    return {
        "object_accuracy": result.object,
        "style_accuracy": result.style,
        "n_images": result.n_images,
        "by_style": {
            name: accuracy_where(verdicts, tasks, lambda t, i=i: t.style == i)
            for i, name in enumerate(emojicanvas.STYLES)
        },
    }


def accuracy_where(verdicts: Any, tasks: Sequence[Task], wanted: Any) -> dict[str, float]:
    rows = [i for i, t in enumerate(tasks) if wanted(t)]
    objects = torch.tensor([tasks[i].object for i in rows])
    styles = torch.tensor([tasks[i].style for i in rows])
    return {
        "object_accuracy": (verdicts.objects[rows] == objects).float().mean().item(),
        "style_accuracy": (verdicts.styles[rows] == styles).float().mean().item(),
    }


def measure_saes(bench: EmojiBenchmark, saes: Sequence[SAE]) -> list[dict[str, Any]]:
    """Quality on held-out prompts, beside PCA and a random SAE, and what splicing each in costs.

    A latent is dead that never fires on rows of the whole grid: the held-out prompts have not every concept."""
    hookpoints = [str(sae.config.hookpoint) for sae in saes]
    held = activation_rows(bench.pipe, hookpoints, [t for t in whole_grid(TEST) if held_out(t)])
    seen = [t for t in whole_grid(STATISTICS) if not held_out(t)]
    fitted = activation_rows(bench.pipe, hookpoints, seen, rows_per_image=16)
    grid = activation_rows(bench.pipe, hookpoints, whole_grid(TEST), rows_per_image=64)
    tasks = whole_grid(TEST)
    unedited = accuracy(bench.unedited(tasks), tasks)
    measured = []
    for sae, rows, fit_rows, all_rows in zip(saes, held, fitted, grid, strict=True):
        config = sae.config
        quality = measure_sae(sae, rows)
        key = f"spliced-everywhere/{str(config.hookpoint).replace(':', '-')}"
        spliced = accuracy(bench.pooled(key, tasks, partial(attach, bench.pipe, Splice(sae))), tasks)
        measured.append(
            {
                "hookpoint": config.hookpoint,
                "d_model": config.d_model,
                "n_latents": config.n_latents,
                "k": config.k,
                "fvu": quality.fvu,
                "fvu_pca": pca_fvu(rows, config.k or round(quality.l0), fit_rows=fit_rows),
                "fvu_random": measure_sae(random_control(sae, fit_rows), rows).fvu,
                "l0": quality.l0,
                "cosine": quality.cosine,
                "dead_share": measure_sae(sae, all_rows).dead,
                "n_rows": quality.rows,
                "n_rows_dead": len(all_rows),
                "object_accuracy_spliced": spliced.object,
                "style_accuracy_spliced": spliced.style,
                "object_accuracy_unedited": unedited.object,
                "style_accuracy_unedited": unedited.style,
                "n_images_spliced": spliced.n_images,
            }
        )
    return measured


def validation_targets(kind: str) -> list[Target]:
    """On which hyperparameters are chosen: every fifth object, or every style."""
    return [t for t in all_targets() if t.kind == kind][:: 5 if kind == OBJECT else 1]


def measure_erasure(
    bench: EmojiBenchmark, eraser: Eraser, judge: Judge, on_row: Callable[[list[dict[str, Any]], dict[str, Any]], None]
) -> None:
    """Choose on validation, then measure the table's rows; `on_row(rows, validation)` hears of every finished row.

    The released code's error sign and the random latents use the hyperparameters that validation chose for SAeUron.
    """
    targets = all_targets()
    real = real_features(judge)
    validation: dict[str, Any] = {}
    chosen: dict[str, Recipe] = {}
    exchanges: dict[str, Method] = {}
    for kind in (OBJECT, STYLE):
        some = validation_targets(kind)
        by_name = {eraser.saeuron(recipe, "keep").name: recipe for recipe in RECIPES}
        best, means = bench.choose([eraser.saeuron(recipe, "keep") for recipe in RECIPES], some)
        chosen[kind] = by_name[best.name]
        exchanges[kind], of_exchanges = bench.choose([eraser.exchange(n) for n in EXCHANGE_LATENTS], some)
        validation[kind] = {
            "chosen": asdict(chosen[kind]),
            "exchange": exchanges[kind].name,
            "means": {**means, **of_exchanges},
            "targets": [t.name for t in some],
        }
    methods: dict[str, Callable[[Target], Method | None]] = {
        "unedited": lambda t: None,
        "exchange": lambda t: exchanges[t.kind],
        "SAeUron": lambda t: eraser.saeuron(chosen[t.kind], "keep"),
        "negative prompt": lambda t: negative_prompt(),
        "as many random latents": lambda t: eraser.random(chosen[t.kind]),
        "SAeUron, released code's error sign": lambda t: eraser.saeuron(chosen[t.kind], "saeuron_released"),
    }
    rows: list[dict[str, Any]] = []
    allowed: dict[str, float] = {}
    for name, method in methods.items():
        for kind in (STYLE, OBJECT):
            row = bench.row(name, kind, {t: method(t) for t in targets}, real)
            if name == "unedited":
                allowed[kind] = allowed_mean(row)
            row["share_of_allowed"] = row["mean"] / allowed[kind]
            rows.append(row)
            on_row(rows, validation)


def evaluate_emoji(
    pipe: Any, saes: Sequence[SAE], judge: Judge, out: Path, work: Path, progress: bool = True
) -> dict[str, Any]:
    """Measure everything on the embedded pipeline, writing `out` after every part. Goes on where an earlier run on the same
    weights stopped: finished parts lie in `work`, in a folder that is named for them."""
    work = work / embedded_fingerprint()
    bench = EmojiBenchmark(pipe, judge, work, n_steps=N_STEPS, guidance=GUIDANCE, progress=progress)
    results: dict[str, Any] = {
        **measured_on_embedded(),
        "protocol": {"n_steps": N_STEPS, "guidance": GUIDANCE, "n_target": 20, "n_other": 40, "precision": precision()},
    }
    report = judge_report()
    results["judge"] = {
        "object_accuracy": report["held_out_augmentations"]["object_accuracy"],
        "style_accuracy": report["held_out_augmentations"]["style_accuracy"],
        "report": report,
    }
    results["generation"] = measure_generation(bench)
    write_json(out, results)
    results["saes"] = measure_saes(bench, saes)
    write_json(out, results)
    places = {sae: place for sae in saes if (place := place_of(sae)) is not None}
    collected = collect_grid_statistics(pipe, list(places), work / "statistics")
    eraser = Eraser(pipe, list(places), list(places.values()), collected)

    def on_row(rows: list[dict[str, Any]], validation: dict[str, Any]) -> None:
        results["erasure"], results["validation"] = rows, validation
        write_json(out, results)

    measure_erasure(bench, eraser, judge, on_row)
    return results
