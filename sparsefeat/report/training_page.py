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
MOST_TICKS = 4


@dataclass(frozen=True)
class Tick:
    """A value on an axis, and its place there in percent."""

    value: float
    place: float


@dataclass(frozen=True)
class Curve:
    """A figure over the steps; `low`, `high`: the edges of its axis; `ticks` of the figure, `step_ticks` of the steps."""

    name: str
    drawn: Markup
    low: float
    high: float
    last: float
    ticks: list[Tick]
    step_ticks: list[Tick]


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

    def height_of(value: float) -> float:
        """As a share of the axis."""
        return (scale(value) - low) / (high - low) if high > low else 0.0

    line = " ".join(f"{WIDTH * step / last_step:.1f},{HEIGHT * (1 - height_of(value)):.1f}" for step, value in points)
    lowest, highest = min(values, default=0.0), max(values, default=0.0)
    return Curve(
        figure,
        Markup('<polyline points="{}"/>').format(line),
        lowest,
        highest,
        values[-1] if values else math.nan,
        [
            Tick(value, 100 * height_of(value))
            for value in (round_values(lowest, highest, logarithmic) if values else [])
        ],
        [Tick(step, 100 * step / last_step) for step in round_values(0, last_step)],
    )


def round_values(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """At most MOST_TICKS values from `low` to `high` that are 1, 2 or 5 times a power of ten, or whole multiples of one; the
    value itself where the two are equal."""
    if high <= low:
        return [low]
    if logarithmic:
        powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [value for power in powers for factor in factors if low <= (value := factor * 10.0**power) <= high]
            if 2 <= len(found) <= MOST_TICKS:
                return found
        if len(powers) > MOST_TICKS:
            return [10.0**power for power in powers[1 :: math.ceil(len(powers) / MOST_TICKS)]]
    power = math.floor(math.log10((high - low) / MOST_TICKS))
    apart = next(
        step for step in (10.0**power * factor for factor in (1, 2, 5, 10, 20)) if (high - low) / step < MOST_TICKS
    )
    return [apart * number for number in range(math.ceil(low / apart), math.floor(high / apart) + 1)]
