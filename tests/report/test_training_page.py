"""The curves of a training run: what stands at their axes is where it says it is."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from sparsefeat.report.training_page import HEIGHT, MOST_TICKS, WIDTH, curve, round_values, write_training_page


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0234, 0.71), (7.2, 8.4), (1e-7, 3.0), (0.9, 1.1), (12.0, 48_000.0), (3e-5, 3.1e-5), (199.0, 201.0)],
)
def test_ticks_are_round_few_and_within_the_axis(low, high, logarithmic):
    ticks = round_values(low, high, logarithmic)
    assert 1 <= len(ticks) <= MOST_TICKS
    assert ticks == sorted(ticks)
    assert all(low * (1 - 1e-9) <= tick <= high * (1 + 1e-9) for tick in ticks)
    apart = min((b - a for a, b in itertools.pairwise(ticks)), default=ticks[0])
    for tick in ticks:  # few digits: of itself, or as a multiple of what lies between two
        digits = tick / 10 ** math.floor(math.log10(tick))
        assert (
            min(abs(digits - one) for one in (1, 2, 3, 5, 10)) < 1e-6 or abs(tick / apart - round(tick / apart)) < 1e-6
        )


def test_a_figure_that_stays_has_one_tick():
    assert round_values(8.0, 8.0) == [8.0]
    assert [tick.value for tick in curve([{"step": 10, "l0": 8.0}, {"step": 20, "l0": 8.0}], "l0").ticks] == [8.0]


def test_ticks_stand_where_the_curve_has_their_value(tmp_path):
    entries = [{"step": step, "fvu": 10 ** (-step / 400), "l0": step / 100} for step in range(100, 801, 100)]
    for name, value_at in (("fvu", lambda step: 10 ** (-step / 400)), ("l0", lambda step: step / 100)):
        drawn = curve(entries, name)
        points = [tuple(map(float, pair.split(","))) for pair in re.findall(r"[\d.]+,[\d.]+", drawn.drawn)]
        assert len(drawn.ticks) >= 2
        for tick in drawn.ticks:
            # Between the curve's points it is straight on its own axis, and so are these two.
            x = next(
                x0 + (x1 - x0) * (HEIGHT * (1 - tick.place / 100) - y0) / (y1 - y0)
                for (x0, y0), (x1, y1) in itertools.pairwise(points)
                if min(y0, y1) - 1e-6 <= HEIGHT * (1 - tick.place / 100) <= max(y0, y1) + 1e-6
            )
            assert value_at(x / WIDTH * 800) == pytest.approx(tick.value, rel=0.01)
        assert [(tick.value, tick.place) for tick in drawn.step_ticks] == [
            (value, pytest.approx(value / 8)) for value in round_values(0, 800)
        ]
    page = write_training_page(tmp_path, {"unet.mid_block": entries, "nothing": []}).read_text()
    assert page.count('class="tick of-value"') == sum(len(curve(entries, name).ticks) for name in ("fvu", "l0"))
