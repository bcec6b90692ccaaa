from __future__ import annotations

import pytest
import scipy.linalg
import torch

from sparsefeat.evaluation.frechet import frechet_distance


def test_agrees_with_scipys_matrix_square_root():
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(57, 9, generator=generator) @ torch.randn(9, 9, generator=generator)
    b = torch.randn(41, 9, generator=generator) * 2 + 1
    cov_a, cov_b = torch.cov(a.double().T), torch.cov(b.double().T)
    root = scipy.linalg.sqrtm((cov_a @ cov_b).numpy()).real
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = float(mean + cov_a.trace() + cov_b.trace() - 2 * root.trace())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_shift_alone_costs_its_square_length():
    a = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    shift = torch.tensor([3.0, 0.0, -4.0, 0.0, 0.0])
    assert frechet_distance(a, a + shift) == pytest.approx(25.0, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [(torch.ones(1, 4), torch.ones(5, 4), "a must be"), (torch.ones(5, 4), torch.ones(5, 3), "same width")],
)
def test_sets_that_cannot_be_compared_are_refused(a, b, word):
    with pytest.raises(ValueError, match=word):
        frechet_distance(a, b)
