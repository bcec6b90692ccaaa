"""Scores against their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.features.scores import area_under_curve, normalized_mean_difference, strictly_above_quantile


def test_the_score_is_the_difference_of_shares():
    target, others = torch.tensor([3.0, 1.0, 0.0, 4.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    expected = torch.tensor([3 / 8 - 1 / 4, 1 / 8 - 1 / 4, 0 - 2 / 4, 4 / 8 - 0], dtype=torch.float64)
    torch.testing.assert_close(normalized_mean_difference(target, others), expected, rtol=0, atol=1e-8)


def test_a_concept_on_which_nothing_fires_scores_without_nan():
    scores = normalized_mean_difference(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(scores, torch.tensor([-0.5, 0.0, -0.5], dtype=torch.float64), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("percentile", "count"), [(99.999, 1), (99.995, 2), (99.99, 3)])
def test_t2_the_papers_percentiles_leave_one_two_and_three_of_20480_latents(percentile, count):
    scores = torch.randn(20480, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    chosen = strictly_above_quantile(scores, percentile)
    assert chosen.tolist() == sorted(scores.topk(count).indices.tolist())


@pytest.mark.parametrize("percentile", [0, 12.5, 50, 90, 99.9, 100])
def test_t2_the_quantile_is_interpolated_linearly_and_exceeded_strictly(percentile):
    scores = torch.randn(123, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    cut = np.quantile(scores.numpy(), percentile / 100, method="linear")
    assert strictly_above_quantile(scores, percentile).tolist() == np.flatnonzero(scores.numpy() > cut).tolist()
    assert strictly_above_quantile(torch.ones(9), percentile).tolist() == []


def test_a_percentile_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="percentile=101 must be a finite number from 0 to 100"):
        strictly_above_quantile(torch.zeros(3), 101)


def test_the_area_under_the_curve_counts_pairs_and_halves_ties():
    generator = torch.Generator().manual_seed(2)
    positive, negative = (torch.randint(0, 5, (n,), generator=generator).float() for n in (17, 23))
    pairs = [(p > q) + 0.5 * (p == q) for p in positive.tolist() for q in negative.tolist()]
    assert area_under_curve(positive, negative) == pytest.approx(sum(pairs) / len(pairs))
    with pytest.raises(ValueError, match="got 0 positive, 3 negative"):
        area_under_curve(torch.zeros(0), torch.zeros(3))
