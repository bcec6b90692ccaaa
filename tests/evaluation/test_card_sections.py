"""The card's steerers, dictionaries and attribution: the arithmetic of their figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsefeat.assets import load_pipeline
from sparsefeat.evaluation.card import dictionaries
from sparsefeat.evaluation.card.dictionaries import dissected
from sparsefeat.evaluation.card.explaining import area
from sparsefeat.evaluation.card.steering import DOSES, figures
from sparsefeat.evaluation.segmentation import Segmentation
from sparsefeat.evaluation.units import Units


def test_the_area_under_a_straight_line_is_its_middle():
    assert area((0.0, 0.3, 1.0), torch.tensor([1.0, 0.7, 0.0])) == pytest.approx(0.5)


def test_a_steerer_is_measured_by_its_order_its_reach_and_what_else_falls():
    p = torch.tensor([[0.1, 0.0], [0.15, 0.05], [0.2, 0.1], [0.4, 0.3], [0.7, 0.2], [0.9, 0.6]]).double()
    q = torch.tensor([[1.0, 0.8], [1.0, 0.8], [1.0, 0.8], [0.9, 0.8], [0.8, 0.6], [0.7, 0.4]]).double()
    rows = {row.metric: row for row in figures("mine", p, q, 5)}
    # In the first picture p follows the dose; in the second two neighbours are exchanged: 1 - 6 * 2 / (6 * 35).
    assert rows["dose"].value == pytest.approx((1 + 1 - 12 / 210) / 2)
    assert rows["reached"].value == pytest.approx((0.8 + 0.6) / 2)
    # Half of 0.7 is reached first at the fourth dose: rises of 0.6 and 0.2, falls of 0.2 and 0.2.
    assert rows["else per unit"].value == pytest.approx(0.2 / 0.4)
    assert rows["reached"].n == 2


def test_a_steerer_that_does_nothing_has_no_quotient():
    p, q = torch.full((1 + len(DOSES), 3), 0.2).double(), torch.ones(1 + len(DOSES), 3).double()
    rows = {row.metric: row for row in figures("nothing", p, q, 5)}
    assert rows["dose"].value == 0
    assert rows["else per unit"].value is None
    assert "less than" in rows["else per unit"].note


def test_each_drawing_is_dissected_by_its_own_mask(monkeypatch: pytest.MonkeyPatch):
    drawings = dictionaries.real_drawings()[:12]
    monkeypatch.setattr(dictionaries, "real_drawings", lambda: drawings)
    rows, masks, of = dictionaries.seen(SimpleNamespace(pipe=load_pipeline()), "unet.up_blocks.1.attentions.0")
    assert rows.shape[:3] == masks.shape == (12, *rows.shape[1:3])
    assert of[:, 0].tolist() == [drawing.objects[0] for drawing in drawings]
    covered = torch.stack([drawing.masks.float().mean() for drawing in drawings])
    assert covered.max() - covered.min() > 0.1
    torch.testing.assert_close(masks.float().mean((1, 2)), covered, rtol=0, atol=0.05)


def test_dissection_finds_the_unit_that_is_an_objects_mask():
    """Ten pictures of two objects, of 5 x 5 places; unit 1 is on in half of the mask of object 0, unit 2 in all of object 1's."""
    pictures, side = 10, 5
    of = torch.tensor([[i % 2, i // 2 % 2] for i in range(pictures)])
    masks = torch.zeros(pictures, side, side, dtype=torch.bool)
    masks[:, 2, 1:3] = True
    rows = 0.01 * torch.rand(pictures, side, side, 3, generator=torch.Generator().manual_seed(0))
    zero = of[:, 0] == 0
    rows[zero, 2, 1, 1] = 5.0
    rows[~zero, 2, 1, 2] = 5.0
    rows[~zero, 2, 2, 2] = 5.0
    # The highest 2 % of the 150 places of the six pictures that units are chosen on are three: all of unit 1's, and three of the
    # six of unit 2's, which are equal: a unit is on above its threshold alone.
    units = Units("given", 3, lambda flat, _: flat.relu())
    found = dissected(units, rows, masks, of)
    assert found[0] == pytest.approx(0.5)


def test_the_intervals_of_maps_hold_their_scores():
    found = Segmentation((0.5,))
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[2:6, 2:6] = True
        found.add(mask + 1.5 * torch.rand(8, 8, generator=generator), mask)
    within, scores = found.intervals(0.5), found.scores(0.5)
    for name in ("miou", "pointing"):
        low, high = within[name]
        assert low < getattr(scores, name) < high or (getattr(scores, name) == 1.0 and low < high)
