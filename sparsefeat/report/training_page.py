"""The page of a training run: what was measured at every SAE, as curves, and the last figures as a table.

One HTML file that needs nothing else. Every number on it is in the `metrics.csv` beside the SAE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from sparsefeat.report.page import environment
from sparsefeat.whole import written_plainly

TEMPLATE, PAGE = "training.html.jinja", "index.html"
LOGARITHMIC = ("fvu", "auxk", "lr", "grad_norm")
WIDTH, HEIGHT = 280, 90


@dataclass(frozen=True)
class Curve:
    """A figure over the steps; `low`, `high`: the edges of its axis."""

    name: str
    drawn: Markup
    low: float
    high: float
    last: float


def write_training_page(folder: Path, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Path:
    """Write `folder/index.html`. runs: what was measured of each SAE, by its name."""
    curves = {
        name: [curve(entries, figure) for figure in entries[-1] if figure != "step"] if entries else []
        for name, entries in runs.items()
    }
    steps = {name: int(entries[-1]["step"]) if entries else 0 for name, entries in runs.items()}
    page = environment().get_template(TEMPLATE).render(curves=curves, steps=steps, width=WIDTH, height=HEIGHT)
    unfinished = folder / f".{PAGE}.unfinished"
    with written_plainly(folder / PAGE):
        unfinished.write_text(page, encoding="utf-8")
        unfinished.replace(folder / PAGE)
    return folder / PAGE


def curve(entries: Sequence[Mapping[str, float]], figure: str) -> Curve:
    """`figure` of every entry that has it, over the steps; on a logarithmic axis where it falls over decades."""
    points = [(entry["step"], entry[figure]) for entry in entries if math.isfinite(entry.get(figure, math.nan))]
    values = [value for _, value in points]
    logarithmic = figure in LOGARITHMIC and all(value > 0 for value in values)
    scale = math.log10 if logarithmic else float
    heights = [scale(value) for value in values]
    low, high = min(heights, default=0.0), max(heights, default=0.0)
    last_step = points[-1][0] if points else 1
    line = " ".join(
        f"{WIDTH * step / last_step:.1f},{HEIGHT - HEIGHT * (height - low) / ((high - low) or 1):.1f}"
        for (step, _), height in zip(points, heights, strict=True)
    )
    drawn = Markup('<polyline points="{}"/>').format(line)
    return Curve(figure, drawn, min(values, default=0.0), max(values, default=0.0), values[-1] if values else math.nan)
