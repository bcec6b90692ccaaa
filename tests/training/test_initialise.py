"""Start values."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Objective, SAETrainer, TrainConfig, geometric_median, initialise


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


@pytest.mark.parametrize("normalizer", ["none", "b_pre", "standardize"])
def test_directions_that_are_rows_leave_no_latent_dead_at_the_start(normalizer):
    torch.manual_seed(3)
    kinds = torch.randn(7, 11) * torch.logspace(0, 1, 7)[:, None]
    sample = kinds[torch.randint(7, (900,))] + 0.3 * torch.randn(900, 11) + 4 * torch.randn(11)
    config = SAEConfig(11, 300, k=2, normalizer=normalizer)
    sae = initialise(SAE(config), sample, seed=1, start="rows")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(300))
    centred = torch.nn.functional.normalize(sae.normalize(sample) - sae.b_out, dim=1)
    assert (sae.W_dec @ centred.T).amax(1).min() > 1 - 1e-5  # each is some row's direction

    def dead(one: SAE) -> int:
        return int((one.encode(sample).dense() != 0).sum(0).eq(0).sum())

    assert dead(sae) == 0 < 30 < dead(initialise(SAE(config), sample, seed=1))
    assert torch.equal(initialise(SAE(config), sample, seed=1, start="rows").W_dec, sae.W_dec)
    assert not torch.equal(initialise(SAE(config), sample, seed=2, start="rows").W_dec, sae.W_dec)


def test_rows_that_are_alike_begin_one_latent():
    torch.manual_seed(4)
    few = torch.randn(12, 5).double()
    few -= geometric_median(few)
    sample = (few * torch.linspace(1, 3, 40).double()[:, None, None]).reshape(-1, 5)
    sae = initialise(SAE(SAEConfig(5, 12, k=2, normalizer="none")).double(), sample, start="rows")
    moved = torch.nn.functional.normalize(sample - sae.b_out, dim=1)
    assert (sae.W_dec @ sae.W_dec.T - torch.eye(12)).max() < 1 - 1e-6
    assert (sae.W_dec @ moved.T).amax(1).min() > 1 - 1e-12
    with pytest.raises(ValueError, match=r"of 30 rows 3 point different ways, and there are 4 latents"):
        initialise(SAE(SAEConfig(5, 4, k=2)), torch.eye(5)[[0, 1, 2]].repeat(10, 1), start="rows")


def test_a_transcoder_that_begins_at_rows_writes_the_targets_of_what_it_reads():
    torch.manual_seed(6)
    sample = torch.randn(80, 9) + 2
    target = sample @ torch.randn(9, 9)
    sae = initialise(SAE(SAEConfig(9, 20, k=3, transcoder=True)), sample, target=target, start="rows")
    read = torch.nn.functional.normalize(sample - sae.b_pre, dim=1)
    written = torch.nn.functional.normalize(target - sae.b_out, dim=1)
    factor = sae.W_enc.norm(dim=1)
    torch.testing.assert_close(factor, factor[:1].expand(20))
    row = (sae.W_dec @ written.T).argmax(1)
    torch.testing.assert_close(sae.W_dec.detach(), written[row])
    torch.testing.assert_close(sae.W_enc / factor[:, None], read[row])


def test_a_run_begins_where_its_config_says():
    torch.manual_seed(7)
    rows = torch.randn(300, 6) @ torch.randn(6, 6) + 1
    sae = SAETrainer(SAE(SAEConfig(6, 40, k=2)), rows, TrainConfig(steps=1, batch_size=64, start="rows")).sae
    directions = torch.nn.functional.normalize(rows - geometric_median(rows), dim=1)
    assert (sae.W_dec @ directions.T).amax(1).min() > 1 - 1e-4
    with pytest.raises(ValueError, match="start='row' must be one of random, rows"):
        TrainConfig(steps=1, start="row")


def test_archetypes_have_their_own_start():
    with pytest.raises(ValueError, match="begins at centres"):
        TrainConfig(steps=1, start="rows", objective=Objective(decoder="archetypal"))
