"""Start values."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import geometric_median, initialise


def test_geometric_median_of_a_triangle_is_its_fermat_point():
    # An equilateral triangle's is its centre; that of one with an angle over 120 degrees is that corner.
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 3**0.5 / 2]]).double()
    torch.testing.assert_close(geometric_median(corners), corners.mean(0), rtol=1e-5, atol=1e-5)
    flat = torch.tensor([[0.0, 0.1], [-1.0, 0.0], [1.0, 0.0]]).double()
    torch.testing.assert_close(geometric_median(flat, max_iterations=1000), flat[0], rtol=0, atol=2e-2)


def test_geometric_median_has_less_summed_distance_than_its_neighbours_and_ignores_outliers():
    torch.manual_seed(2)
    rows = torch.randn(501, 7).double()
    rows[:5] += 1e4
    median = geometric_median(rows)
    assert median.norm() < 0.5 < rows.mean(0).norm()
    best = (rows - median).norm(dim=1).sum()
    for _ in range(20):
        moved = median + 0.05 * torch.nn.functional.normalize(torch.randn(7).double(), dim=0)
        assert (rows - moved).norm(dim=1).sum() > best


def test_geometric_median_of_equal_rows_and_of_none():
    torch.testing.assert_close(geometric_median(torch.full((4, 3), 2.5)), torch.full((3,), 2.5))
    with pytest.raises(ValueError, match="at least one row"):
        geometric_median(torch.empty(0, 3))


@pytest.mark.parametrize("normalizer", ["none", "b_pre", "standardize"])
def test_start_values(normalizer):
    torch.manual_seed(5)
    sample = torch.randn(400, 11) + 4 * torch.randn(11)
    sae = initialise(SAE(SAEConfig(11, 50, k=6, normalizer=normalizer)), sample, seed=1)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(50))
    factor = sae.W_enc.norm(dim=1)
    torch.testing.assert_close(sae.W_enc, sae.W_dec * factor[0])  # tied up to one factor
    assert not sae.b_enc.any()
    rows = sample
    if normalizer == "standardize":
        rows = (sample - sample.mean(1, keepdim=True)) / sample.std(1, keepdim=True)
    torch.testing.assert_close(sae.b_out.detach(), geometric_median(rows), rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.b_pre, torch.zeros(11) if normalizer == "none" else sae.b_out)
    # The factor is the best one: the error is a parabola in it, least here.
    error = (sae(sample) - sample).square().sum()
    for change in (0.95, 1.05):
        with torch.no_grad():
            sae.W_enc *= change
            assert (sae(sample) - sample).square().sum() > error
            sae.W_enc /= change
    other = initialise(SAE(sae.config), sample, seed=1)
    assert torch.equal(other.W_dec, sae.W_dec)
    assert not torch.equal(initialise(other, sample, seed=2).W_dec, sae.W_dec)


def test_a_pca_normaliser_is_fitted_to_the_sample():
    torch.manual_seed(1)
    sample = (torch.randn(4000, 6) * torch.tensor([9.0, 3, 1, 0.5, 0.1, 0])) @ torch.linalg.qr(torch.randn(6, 6)).Q + 4
    sae = initialise(SAE(SAEConfig(6, 24, k=2, normalizer="pca", clip=5.0)), sample)
    normal = sae.normalize(sample)
    kept = normal.abs().amax(1) < 5
    torch.testing.assert_close(normal[:, :5].mean(0), torch.zeros(5), atol=2e-2, rtol=0)
    torch.testing.assert_close(torch.cov(normal[:, :5].T), torch.eye(5), atol=5e-2, rtol=0)
    assert normal[:, 5].abs().max() < 0.1  # no spread there, and none made up
    undone = sae.denormalize(normal)
    torch.testing.assert_close(undone[kept], sample[kept], atol=1e-3, rtol=1e-3)
