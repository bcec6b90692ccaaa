"""A run: published recipes at several places of a source, each SAE in a folder of its own, with its model card."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsefeat.sae import SAE
from sparsefeat.sae.config import PURSUITS
from sparsefeat.sae.model_card import model_card
from sparsefeat.training.activations.rows import Source
from sparsefeat.training.learning.itda import build_itda
from sparsefeat.training.ranks import ALONE, Ranks
from sparsefeat.training.run.checkpoint import newest_checkpoint, read_description
from sparsefeat.training.run.published import Recipe, batch_size_of, recipe
from sparsefeat.training.run.trainer import SAETrainer, fit_together
from sparsefeat.whole import written_plainly

BATCHES_AN_EPOCH = 8
CARD, SETTINGS = "README.md", "train.json"
MEASURED = {"fvu": "FVU in training", "l0": "active latents a row", "dead": "share of dead latents"}
"""What of the last measured step the card has, and how it calls it."""


@dataclass(frozen=True)
class Trained:
    """An SAE that is done. entries: what was measured on the way; none of a dictionary that is built in one pass."""

    sae: SAE
    preset: str
    folder: Path
    entries: list[dict[str, float]] = field(repr=False)


def fitting_batch_size(rows: int, presets: Sequence[str]) -> int:
    """The presets' own, or as many as make BATCHES_AN_EPOCH batches of the rows, if those are fewer."""
    return max(1, min(*(batch_size_of(name) for name in presets), rows // BATCHES_AN_EPOCH))


def train_presets(
    source: Source,
    hookpoints: Sequence[str],
    presets: Sequence[str],
    folder: Path,
    *,
    base_model: str | None = None,
    device: str = "cpu",
    ranks: Ranks = ALONE,
    tensorboard: bool = False,
    settings: Mapping[str, Any] | None = None,
) -> list[Trained]:
    """Train every preset at every hookpoint, which are the source's places in this order, and write the SAEs.

    All in step and on the same batches, so that a pipeline that draws them runs once for all. `settings` are arguments of
    `recipe`. An SAE's folder, in `folder`, is named after its hookpoint, and its preset if there are several; it has the
    SAE, its card, what was measured and the last checkpoint.
    """
    wanted = list(itertools.product(range(len(hookpoints)), presets))
    settings = dict(settings or {})
    rows = _same_rows(folder, {at: {**source.origin(i), "base_model": base_model} for i, at in enumerate(hookpoints)})
    folders = {
        (place, name): folder / "-".join([hookpoints[place].replace(":", "-"), *([name] if len(presets) > 1 else [])])
        for place, name in wanted
    }
    recipes: dict[tuple[int, str], Recipe] = {}
    for (place, name), own in folders.items():
        of_sae = {**settings.get("sae", {}), "hookpoint": hookpoints[place], "base_model": base_model}
        width = _width(source, place, own, ranks)
        recipes[place, name] = recipe(name, width, **{**settings, "sae": {**of_sae, "metadata": {"preset": name}}})
    shared = {(made.train.batch_size, made.train.seed) for made in recipes.values()}
    if len(shared) > 1:
        raise ValueError(f"presets have different batch sizes, {sorted(size for size, _ in shared)}: give batch_size=.")
    gradual = {key: made for key, made in recipes.items() if made.sae.activation not in PURSUITS}
    trainers = {
        (place, name): SAETrainer(
            SAE(made.sae).to(device),
            source,
            made.train,
            folders[place, name],
            place=place,
            ranks=ranks,
            tensorboard=tensorboard,
        )
        for (place, name), made in gradual.items()
    }
    if ranks.first:
        _write_settings(folder, {"presets": list(presets), "hookpoints": list(hookpoints), **settings, "rows": rows})
    done = dict(zip(trainers, fit_together(list(trainers.values())), strict=True)) if trainers else {}
    for key, made in recipes.items():
        if key not in done:
            done[key] = _built(source, key[0], made, device)
    found = []
    for key in wanted:
        entries = [_told(entry, recipes[key]) for entry in trainers[key].log] if key in trainers else []
        found.append(Trained(done[key], key[1], folders[key], entries))
        if ranks.first:
            _write(found[-1], recipes[key])
    ranks.wait()
    return found


def _width(source: Source, place: int, folder: Path, ranks: Ranks) -> int:
    """Of the rows at a place; known from the checkpoint where there is one, as a pipeline would have to draw."""
    checkpoint = newest_checkpoint(folder)
    if checkpoint is not None:
        return int(read_description(checkpoint)["sae_config"]["d_model"])
    return int(source.sample(place, 1, 0, ranks).rows.shape[-1])


def _built(source: Source, place: int, made: Recipe, device: str) -> SAE:
    """A dictionary of data points: every process goes through all batches by itself, as each atom depends on the last."""
    config = made.sae
    batches = source.stream(made.train.batch_size, made.train.seed, 0, ALONE)
    rows = (batch[place].rows.to(device, torch.float32) for batch in itertools.islice(batches, made.train.steps))
    activation, k = config.activation, config.k or 1
    of = {"activation": activation, "hookpoint": config.hookpoint, "base_model": config.base_model}
    return build_itda(rows, config.n_latents, k, **of)


def _told(entry: dict[str, float], made: Recipe) -> dict[str, float]:
    """Without the share of dead latents as long as fewer rows were seen than a latent needs to count as dead."""
    early = entry["step"] * made.train.batch_size < made.train.objective.dead_after
    return {name: value for name, value in entry.items() if name != "dead" or not early}


def _same_rows(folder: Path, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the rows at each hookpoint are of, with what an earlier run in this folder had at others.

    Raises:
        ValueError: at one of these it had other rows: it cannot be gone on from, and what it made is not of these.
    """
    place = folder / SETTINGS
    earlier = json.loads(place.read_text(encoding="utf-8")).get("rows", {}) if place.is_file() else {}
    mine = json.loads(json.dumps(rows))
    for at in earlier.keys() & mine.keys():
        before, now = earlier[at], mine[at]
        other = next((name for name in sorted(before.keys() & now.keys()) if before[name] != now[name]), None)
        if other is not None:
            raise ValueError(
                f"{folder} was trained on other rows at {at} ({other} {before[other]!r}, not {now[other]!r}): use those, or "
                "another folder"
            )
    return {**earlier, **mine}


def _write_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """What was asked, for whoever finds the folder; it is there before anything else is."""
    with written_plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _write(trained: Trained, made: Recipe) -> None:
    sae, folder = trained.sae, trained.folder
    measured = trained.entries[-1] if trained.entries else {}
    facts: dict[str, Any] = {"preset": trained.preset}
    if measured:
        facts |= {"optimiser steps": int(measured["step"]), "rows a step": made.train.batch_size}
    facts |= {title: f"{measured[name]:.4g}" for name, title in MEASURED.items() if name in measured}
    with written_plainly(folder):
        sae.save(folder, overwrite=True)
        (folder / CARD).write_text(model_card(sae, str(folder), None, facts), encoding="utf-8")


def summaries(found: Sequence[Trained]) -> Iterator[str]:
    """A line an SAE."""
    for one in found:
        last = one.entries[-1] if one.entries else {}
        figures = ", ".join(f"{name} {last[name]:.4g}" for name in MEASURED if name in last)
        yield f"{one.folder}: {one.sae.n_latents:,} latents of width {one.sae.d_model}{', ' if figures else ''}{figures}"
