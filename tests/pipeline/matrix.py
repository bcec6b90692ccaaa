"""The configurations in which `attach` has to keep its promises: every family, its guidance, batches, sizes and modes.

`MATRIX=full` in the environment takes the whole product, as `make matrix` does. Otherwise a covering array is taken:
few configurations in which every two values of every two axes still meet. Not in it are two prompts with one image each,
since two with two are, and fp16, which a CPU computes slowly: one configuration of each family that is not in PLAIN_ONLY has
both. What two prompts change is seen in every family by `tests/pipeline/knowing/test_what_changes.py`.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.families import TinyFamily
from tests.pipeline.caches import CACHES

BATCHES = {"1": (1, 1), "2": (2, 1), "2 x 2 images": (2, 2)}
"""Prompts, and images a prompt."""
MODES = (
    "plain",
    "bf16",
    "fp16",
    "LoRA",
    "fused projections",
    "gradient checkpointing",
    "layerwise casting",
    "group offload",
)

FURTHER_MODES = (*CACHES, "int8 (torchao)", "int8 (bitsandbytes)")
"""Tried on one configuration of each family: two prompts, guidance if it can be, wide."""

PLAIN_ONLY = (
    "controlnet",
    "flux_img2img",
    "img2img",
    "inpaint",
    "instruct_pix2pix",
    "kandinsky",
    "pag",
    "sd3_img2img",
)
"""Pipelines around a model that another family runs in every mode: theirs are "plain" and "bf16"."""


@dataclass(frozen=True)
class Cell:
    """One configuration."""

    family: str
    option: str
    """One of the family's variants, "" for a family without."""
    mode: str
    guidance: bool
    batch: str
    size: str

    def __str__(self) -> str:
        guidance = "guided" if self.guidance else "unguided"
        parts = (self.family, self.option, self.mode, guidance, f"batch {self.batch}", self.size)
        return ", ".join(part for part in parts if part)


def cells(family: TinyFamily) -> list[Cell]:
    """The configurations of a family to test, those that share a pipeline next to each other."""
    plain = next((name for name, build in family.options.items() if not build), "")
    axes = {
        "option": (plain, *(name for name in family.options if name != plain)),
        "mode": MODES[:2] if family.name in PLAIN_ONLY else MODES,
        "guidance": (True, False) if family.guidance == "cfg" else (False,),
        "batch": tuple(BATCHES),
        "size": ("square", "wide"),
    }
    full = os.environ.get("MATRIX") == "full"
    if full:
        rows = product(axes)
    else:
        fewer = {"mode": tuple(mode for mode in axes["mode"] if mode != "fp16"), "batch": ("1", "2 x 2 images")}
        rows = pairwise(axes | fewer, seed=len(family.name))
    rows = [row for row in rows if not (family.alone and row["guidance"] and row["batch"] != "1")]
    ordered = sorted(rows, key=lambda row: (axes["option"].index(row["option"]), MODES.index(row["mode"])))
    further = {"option": plain, "guidance": family.guidance == "cfg", "batch": "2", "size": "wide"}
    if family.alone:
        further["batch"] = "1"
    if family.name not in PLAIN_ONLY:
        ordered += [{**further, "mode": mode} for mode in (FURTHER_MODES if full else ("fp16", *FURTHER_MODES))]
    return [Cell(family=family.name, **row) for row in ordered]


def product(axes: Mapping[str, Sequence]) -> list[dict]:
    return [dict(zip(axes, row, strict=True)) for row in itertools.product(*axes.values())]


def pairwise(axes: Mapping[str, Sequence], seed: int = 0) -> list[dict]:
    """Rows in which every pair of values of two axes occurs, found greedily; the same for the same seed.

    Each row begins with a pair that is still missing and takes on every other axis the value that brings the most
    missing pairs; of several rows made so, in random orders of the axes, the best is kept.
    """
    chance = random.Random(seed)
    names = list(axes)
    missing = {
        frozenset([(a, x), (b, y)]) for a, b in itertools.combinations(names, 2) for x in axes[a] for y in axes[b]
    }
    if len(names) == 1:
        return product(axes)
    rows = []
    while missing:
        candidates = [_row(axes, missing, chance) for _ in range(10)]
        best = max(candidates, key=lambda row: len(_pairs(row) & missing))
        missing -= _pairs(best)
        rows.append({name: best[name] for name in names})
    return rows


def _row(axes: Mapping[str, Sequence], missing: set[frozenset], chance: random.Random) -> dict:
    row = dict(chance.choice(sorted(missing, key=lambda pair: sorted(map(str, pair)))))
    rest = [name for name in axes if name not in row]
    chance.shuffle(rest)
    for name in rest:
        values = list(axes[name])
        chance.shuffle(values)
        row[name] = max(values, key=lambda value: len(_pairs({**row, name: value}) & missing))
    return row


def _pairs(row: Mapping) -> set[frozenset]:
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
