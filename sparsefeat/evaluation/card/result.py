"""Rows of the card, and the file that holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from sparsefeat.assets import embedded_fingerprint
from sparsefeat.evaluation.emoji import write_json
from sparsefeat.measure.machine import device_name, precision, versions


@dataclass(frozen=True)
class Row:
    """One figure. section: "erasers", "steerers", ...; of: what it was measured on; ci: 95 %, where there is one;
    n: how many images (or rows, or maps) it rests on; seed: of the first image's noise; fingerprint: of what was measured.
    """

    section: str
    method: str
    of: str
    metric: str
    value: float | None
    ci: tuple[float, float] | None
    n: int
    seed: int
    fingerprint: str
    note: str = ""


def write_card(path: Path, rows: Sequence[Row], budget: str, fingerprint: str, chosen: dict[str, Any]) -> None:
    """All rows, whole and renamed into place."""
    write_json(
        path,
        {
            "device": device_name(),
            "date": date.today().isoformat(),
            "versions": versions(),
            "precision": precision(),
            "budget": budget,
            "fingerprint": fingerprint,
            "chosen": chosen,
            "rows": [asdict(row) for row in rows],
        },
    )


def rows_of_others(
    path: Path, sections: Sequence[str], budget: str, fingerprint: str
) -> tuple[list[Row], dict[str, Any]]:
    """What a card has of other sections than these, and what was chosen for it; nothing of other weights or another budget."""
    try:
        results = json.loads(Path(path).read_text())
        if (results["budget"], results["fingerprint"]) != (budget, fingerprint):
            return [], {}
        return [_row(row) for row in results["rows"] if row["section"] not in sections], results["chosen"]
    except (OSError, ValueError, KeyError, TypeError):  # no card yet, or no card
        return [], {}


def _row(row: dict[str, Any]) -> Row:
    return Row(**{**row, "ci": None if row["ci"] is None else tuple(row["ci"])})


def stale(results: dict[str, Any], fingerprint: str | None = None) -> bool:
    """Whether any row of a card was measured on another pipeline, SAE or judge than the package's own (or `fingerprint`)."""
    own = embedded_fingerprint() if fingerprint is None else fingerprint
    return any(row["fingerprint"] != own for row in results["rows"])


def load_card(path: Path, fingerprint: str | None = None) -> list[Row]:
    """The rows of a card.

    Raises:
        ValueError: they were measured on another pipeline than the package's own (or than `fingerprint`).
    """
    results = json.loads(Path(path).read_text())
    if stale(results, fingerprint):
        raise ValueError(
            f"{path} was measured on {results['fingerprint']}, which is not the pipeline of this package; measure it again, "
            "`sparsefeat evaluate card`."
        )
    return [_row(row) for row in results["rows"]]
