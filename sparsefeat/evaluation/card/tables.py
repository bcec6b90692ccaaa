"""The card as Markdown: a table a section, and what it says in words, both from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsefeat.evaluation.card.budget import FULL, QUICK
from sparsefeat.evaluation.card.erasers import ERASERS
from sparsefeat.evaluation.emoji import OBJECT, STYLE

COLUMNS: dict[str, tuple[str, ...]] = {
    "erasers": ("UA", "IRA", "CRA", "of possible", "ERB", "paraphrased UA", "adversarial UA", "Fréchet", "time"),
    "steerers": ("dose", "reached", "else per unit"),
    "maps": ("mIoU", "pointing"),
    "dictionaries": ("FVU", "probing", "JS", "IoU"),
    "attribution": ("C-Deletion", "C-Insertion"),
    "judges": ("accuracy",),
}
PLAIN = ("Fréchet", "time", "dose", "else per unit", "FVU", "JS")
"""Columns that are no shares."""
GOAL = 0.97
"""Of what is possible, that the best eraser is to reach."""


def card_markdown(results: dict[str, Any], section: str) -> str:
    """The tables of one section, one for each thing it was measured on, with what they say."""
    rows = [row for row in results["rows"] if row["section"] == section]
    if not rows:
        return "Not measured yet."
    parts = []
    for of in dict.fromkeys(row["of"] for row in rows):
        own = {(row["method"], row["metric"]): row for row in rows if row["of"] == of}
        columns = [metric for metric in COLUMNS[section] if any(name == metric for _, name in own)]
        methods = list(dict.fromkeys(method for method, _ in own))
        lines = [["method", *columns], *([m, *(_cell(own.get((m, c)), c) for c in columns)] for m in methods)]
        text = "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], ["---"] * len(lines[0]), *lines[1:]))
        parts.append(f"**{of}**\n\n{text}")
        if section == "erasers":
            parts.append(" ".join(_erasers_say(own, of)))
    notes = sorted({row["note"] for row in rows if row["note"]})
    if notes:
        parts.append(f"Dashes and reservations: {'; '.join(notes)}.")
    return "\n\n".join(parts)


def card_header(results: dict[str, Any]) -> str:
    """When, where and with what."""
    is_quick = results["budget"] == QUICK.name
    budget, quick = (QUICK, " --quick") if is_quick else (FULL, "")
    said = (
        f"Measured on {results['date']}, {results['device']}, {results['precision']}, with `sparsefeat evaluate card{quick}`; "
        f"weights {results['fingerprint']}. Erased: {_counted(budget.objects, 'object')} and {_counted(budget.styles, 'style')}, "
        f"{budget.n_target} images of each. Under the adversary: {_counted(budget.attacked, 'object')}, {budget.n_inverted} images "
        f"of each; spared of learned words: {', '.join(budget.spared)}."
    )
    return said + " The quick card: its intervals are wide; good for a look, not for quoting." if is_quick else said


def _counted(some: Sequence[object], thing: str) -> str:
    return f"{len(some)} {thing}{'' if len(some) == 1 else 's'}"


def _cell(row: dict[str, Any] | None, metric: str) -> str:
    if row is None or row["value"] is None:
        return "–"
    scale, form = (1, ".2f") if metric in PLAIN else (100, ".0f")
    value = f"{'≤ ' if row.get('bound') else ''}{scale * row['value']:{form}}"
    if row["ci"] is None:
        return value
    low, high = (f"{scale * end:{form}}" for end in row["ci"])
    return f"{value} [{low}, {high}]"


def _erasers_say(own: dict[tuple[str, str], dict[str, Any]], of: str) -> list[str]:
    baselines = {eraser.name for eraser in ERASERS if eraser.baseline}
    said = []

    def of_metric(metric: str, among: Sequence[str] | None = None) -> list[dict[str, Any]]:
        found = [row for (method, name), row in own.items() if name == metric and row["value"] is not None]
        return sorted((r for r in found if among is None or r["method"] in among), key=lambda r: -r["value"])

    ranked = [row for row in of_metric("of possible") if row["method"] != "unedited"]
    if ranked:
        best, worst = ranked[0], ranked[-1]
        reached = "which reaches" if best["value"] >= GOAL else "short of"
        kinds = {OBJECT: "objects", STYLE: "styles"}
        said.append(
            f"Best for {kinds.get(of, of)}: {best['method']}, {best['value']:.1%} of what is possible (interval from "
            f"{best['ci'][0]:.0%} on), {reached} the {GOAL:.0%} aimed at. Worst: {worst['method']}, {worst['value']:.1%}."
        )
    attacked = of_metric("adversarial UA")
    own_ones = [row for row in attacked if row["method"] not in baselines and not row.get("bound")]
    base = [row for row in attacked if row["method"] in baselines]
    if own_ones and base and not own_ones[0]["note"]:  # an adversary that does not count says so in its notes
        first, second = own_ones[0], base[0]
        ahead = first["ci"][0] > second["ci"][1]
        said.append(
            f"Under the adversary {first['method']} keeps {first['value']:.1%} of the images without the target, the best baseline, "
            f"{second['method']}, {second['value']:.1%}: {'ahead' if ahead else 'not ahead'} outside the intervals."
        )
    return said
