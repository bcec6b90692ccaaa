"""Rows of the card, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparsefeat.evaluation.results import measured_on_embedded, stale
from sparsefeat.measure.machine import precision
from sparsefeat.whole import write_json


@dataclass(frozen=True)
class Row:
    """One figure. section: "erasers", "steerers", ...; of: what it was measured on; ci: 95 %, where there is one;
    n: how many images (or rows, or maps) it rests on; seed: of the first image's noise. bound: the figure is at most that.
    """

    section: str
    method: str
    of: str
    metric: str
    value: float | None
    ci: tuple[float, float] | None
    n: int
    seed: int
    note: str = ""
    bound: bool = False


def write_card(path: Path, rows: Sequence[Row], budget: str, chosen: dict[str, Any]) -> None:
    """All rows, whole and renamed into place."""
    about = {**measured_on_embedded(), "precision": precision(), "budget": budget}
    write_json(path, {**about, "chosen": chosen, "rows": [asdict(row) for row in rows]})


def rows_of_others(path: Path, sections: Sequence[str], budget: str) -> tuple[list[Row], dict[str, Any]]:
    """What a card has of other sections than these, and what was chosen for it; nothing of other weights or another budget."""
    try:
        results = json.loads(Path(path).read_text())
        if results["budget"] != budget or stale(results):
            return [], {}
        return [_row(row) for row in results["rows"] if row["section"] not in sections], results["chosen"]
    except (OSError, ValueError, KeyError, TypeError):  # no card yet, or no card
        return [], {}


def _row(row: dict[str, Any]) -> Row:
    return Row(**{**row, "ci": None if row["ci"] is None else tuple(row["ci"])})


def load_card(path: Path) -> list[Row]:
    """The rows of a card.

    Raises:
        ValueError: they were measured on another pipeline, SAE or judge than the package's own.
    """
    results = json.loads(Path(path).read_text())
    if stale(results):
        raise ValueError(
            f"{path} was measured on {results['fingerprint']}, which is not the pipeline of this package; measure it again, "
            "`sparsefeat evaluate card`."
        )
    return [_row(row) for row in results["rows"]]
