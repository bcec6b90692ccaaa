"""What came of every cell of the matrix, over the files that run its parts; written to the file `MATRIX_RESULTS` names."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

from tests.families import TinyFamily, families
from tests.pipeline import promises
from tests.pipeline.families.test_claims import REFUSED, exported
from tests.pipeline.matrix import Cell, cells
from tests.pipeline.modular import PIPELINES as MODULAR

FAMILIES = families()
VERSIONS = ("torch", "triton", "diffusers", "transformers", "numpy", "peft", "accelerate")


def kind(family: TinyFamily) -> str:
    """Which of the files runs its cells: "unets", "videos", "joint" (the text is in the blocks) or "cross" (it is not)."""
    inside = [block for block in family.blocks if not block.path.startswith("text_encoder")]
    if not inside[0].path.startswith("transformer"):
        return "unets"
    if any(len(block.square or ()) == 3 for block in inside):
        return "videos"
    return "joint" if any(block.stream == "text" for block in inside) else "cross"


def of_kind(name: str) -> pytest.MarkDecorator:
    """Parametrises a test with the cells of a kind of families, and each one's turn among those of its family."""
    chosen = [family for family in FAMILIES.values() if kind(family) == name]
    found = [(cell, turn) for family in chosen for turn, cell in enumerate(cells(family))]
    assert found
    return pytest.mark.parametrize(
        ("cell", "turn"), found, ids=lambda value: "" if isinstance(value, int) else str(value)
    )


@pytest.fixture(scope="session")
def results() -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {name: defaultdict(list) for name in FAMILIES}
    yield found
    path = os.environ.get("MATRIX_RESULTS")
    if path:
        Path(path).write_text(json.dumps(_summary(found), indent=1, sort_keys=True) + "\n")


def keeps_its_promises(cell: Cell, turn: int, results: dict[str, Any]) -> None:
    family = FAMILIES[cell.family]
    if not family.available:
        pytest.skip(f"{family.pipeline} is not in this diffusers")
    try:
        outcome = promises.check(cell, turn)
    except promises.NotHere as reason:
        results[cell.family]["not here"].append((cell.mode, str(reason)))
        pytest.skip(str(reason))
    except pytest.skip.Exception as reason:
        results[cell.family]["not here"].append((cell.mode, str(reason)))
        raise
    results[cell.family]["cells"].append((cell, outcome))
    broken = {promise: wrong for promise, wrong in outcome.items() if wrong}
    assert not broken, "\n".join(f"{promise}: {wrong}" for promise, wrong in broken.items())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    families_ = {}
    for name, family in FAMILIES.items():
        kept, broken, modes = Counter(), Counter(), defaultdict(Counter)
        for cell, outcome in found[name]["cells"]:
            for promise, wrong in outcome.items():
                (broken if wrong else kept)[promise] += 1
            modes[cell.mode]["broken" if any(outcome.values()) else "kept"] += 1
        for mode, _ in found[name]["compiled"]:
            modes[mode]["kept"] += 1
        reasons = dict(found[name]["not here"])
        families_[name] = {
            "title": family.title,
            "pipeline": family.pipeline,
            "available": family.available,
            "promises": {promise: [kept[promise], kept[promise] + broken[promise]] for promise in kept | broken},
            "modes": {mode: [count["kept"], sum(count.values())] for mode, count in modes.items()},
            "not here": {mode: reason for mode, reason in reasons.items() if mode not in modes},
            "own loop": next(iter(found[name]["own loop"]), None),
        }
    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in VERSIONS}},
        "cells": os.environ.get("MATRIX", "pairwise"),
        "modular": sorted(FAMILIES[name].title for name in MODULAR),
        "refused": sorted(REFUSED & exported().keys()),
        "families": families_,
    }
