"""SAE metrics against their formulas in float64, whatever the batches."""

from __future__ import annotations

import pytest
import torch
from sparsefeat_kernels import SparseCode

from sparsefeat.evaluation.sae_metrics import SAEMetrics, SAEQuality, measure_sae, pca_fvu, random_control
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Batch


def example(n_rows: int = 217, activation: str = "topk") -> tuple[SAE, torch.Tensor]:
    torch.manual_seed(8)
    sae = SAE(SAEConfig(10, 45, activation, k=4)).eval()
    with torch.no_grad():
        sae.b_out.normal_()
        sae.b_enc[:3] = -100  # three latents that cannot fire
    return sae, torch.randn(n_rows, 10) * torch.arange(1, 11) + 5


@pytest.mark.parametrize("batch_size", [1, 50, 1000])
def test_quality_is_that_of_the_formulas_for_any_batch_size(batch_size):
    sae, x = example()
    quality = measure_sae(sae, x, batch_size)
    x_hat, z = sae(x).detach().double(), sae.encode(x).dense()
    x = x.double()
    assert quality.rows == 217
    assert quality.fvu == pytest.approx(float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()), rel=1e-6)
    cosine = (x * x_hat).sum(1) / (x.norm(dim=1) * x_hat.norm(dim=1))
    assert quality.cosine == pytest.approx(float(cosine.mean()), rel=1e-6)
    assert quality.norm_ratio == pytest.approx(float((x_hat.norm(dim=1) / x.norm(dim=1)).mean()), rel=1e-6)
    assert quality.l0 == pytest.approx(float((z != 0).sum(1).double().mean()))
    torch.testing.assert_close(quality.density, (z != 0).float().mean(0))
    assert quality.dead == pytest.approx(float((quality.density == 0).double().mean()))
    assert quality.dead >= 3 / 45
    assert "FVU" in str(quality)


def test_a_store_s_batches_and_leading_dimensions_count_the_same():
    sae, x = example(210)
    sae, x = (
        sae.double(),
        x.double(),
    )  # in fp32 a row's product may depend on how many rows there are, and on the threads
    assert measure_sae(sae, x.view(3, 70, 10)).fvu == pytest.approx(measure_sae(sae, x).fvu, rel=1e-9)
    assert measure_sae(sae, iter(x.split(33))).fvu == pytest.approx(measure_sae(sae, x).fvu, rel=1e-9)


def test_a_large_mean_does_not_cancel():
    """With E[x^2] - E[x]^2 in float32 the variance of these rows would be lost altogether."""
    x = example()[1].double()
    code = SparseCode(torch.zeros(217, 1), torch.zeros(217, 1).int(), 45)
    metrics = SAEMetrics(10, 45)
    noise = 0.1 * torch.randn_like(x)
    for part, error in zip((x + 1e7).split(40), noise.split(40), strict=True):
        metrics.update(part, part + error, SparseCode(code.values[: len(part)], code.indices[: len(part)], 45))
    expected = float(noise.square().sum() / (x - x.mean(0)).square().sum())
    assert metrics.result().fvu == pytest.approx(expected, rel=1e-5)


def test_batch_topk_is_measured_as_it_is_used_and_the_mode_is_put_back():
    sae, x = example(activation="batch_topk")
    expected = measure_sae(sae, x)
    sae.train()
    assert measure_sae(sae, x).fvu == expected.fvu
    assert sae.training


def test_a_perfect_and_a_constant_reconstruction_have_fvu_zero_and_one():
    _, x = example()
    code = SparseCode(torch.zeros(217, 1), torch.zeros(217, 1).int(), 45)
    for x_hat, fvu in ((x, 0.0), (x.double().mean(0).expand_as(x).float(), 1.0)):
        metrics = SAEMetrics(10, 45)
        metrics.update(x, x_hat, code)
        assert metrics.result().fvu == pytest.approx(fvu, abs=1e-6)
        assert metrics.result().dead == 1


@pytest.mark.parametrize("k", [1, 4, 10])
def test_pca_fvu_is_the_share_of_the_discarded_singular_values(k):
    _, x = example()
    values = torch.linalg.svdvals(x.double() - x.double().mean(0)).square()
    assert pca_fvu(x, k, batch_size=31) == pytest.approx(float(values[k:].sum() / values.sum()), abs=1e-9)


def test_pca_fitted_on_other_rows_is_the_error_of_that_reconstruction():
    _, x = example()
    fit = x[:100] @ torch.randn(10, 10) + 1
    mean = fit.double().mean(0)
    directions = torch.linalg.svd(fit.double() - mean).Vh[:3]
    x_hat = (x.double() - mean) @ directions.T @ directions + mean
    expected = (x - x_hat).square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert pca_fvu(x, 3, fit_rows=fit) == pytest.approx(float(expected), rel=1e-9)


def test_the_random_control_is_untrained_repeatable_and_worse_than_a_fitted_dictionary():
    torch.manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(45, 10), dim=1)
    rows = directions[torch.randint(0, 45, (300,))] * (1 + torch.rand(300, 1))
    sae = SAE(SAEConfig(10, 45, k=1)).eval()
    with torch.no_grad():
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions)
    control = random_control(sae, rows, seed=3)
    assert control.config == sae.config
    assert torch.equal(random_control(sae, rows, seed=3).W_dec, control.W_dec)
    assert torch.equal(control.b_out, sae.b_out)
    assert measure_sae(sae, rows).fvu < 1e-6 < 0.1 < measure_sae(control, rows).fvu


def test_what_users_get_wrong_is_said():
    sae, x = example()
    with pytest.raises(ValueError, match="no rows were measured"):
        measure_sae(sae, x[:0])
    with pytest.raises(ValueError, match="the 7 rows have no variance"):
        measure_sae(sae, x[:1].expand(7, 10))
    with pytest.raises(ValueError, match="do not belong together"):
        SAEMetrics(10, 45).update(x, x[:5], sae.encode(x))
    with pytest.raises(ValueError, match="k is 11: choose from 1 to d_model, 10"):
        pca_fvu(x, 11)
    with pytest.raises(ValueError, match="rows is empty"):
        pca_fvu(x[:0], 2)


def test_the_random_control_of_an_sae_with_thresholds_has_as_many_active_latents():
    torch.manual_seed(3)
    rows = torch.randn(600, 10)
    for config in (SAEConfig(10, 50, "jumprelu"), SAEConfig(10, 50, "batch_topk", k=4, inference="threshold")):
        sae = SAE(config).eval()
        with torch.no_grad():
            sae.threshold.fill_(1.5)
        l0 = measure_sae(sae, rows).l0
        assert 2 < l0 < 12
        assert measure_sae(random_control(sae, rows), rows).l0 == pytest.approx(round(l0), abs=0.2)
    itda = SAE(SAEConfig(10, 50, "matching_pursuit", k=4, normalizer="unit_norm")).eval()
    control = random_control(itda, rows, seed=1)
    assert 3 < measure_sae(control, rows).l0 <= 4  # a step may choose an atom again
    assert not torch.equal(control.W_dec, itda.W_dec)


def test_transcoders_and_temporal_saes_are_measured_with_what_they_need():
    torch.manual_seed(4)
    x, y = torch.randn(60, 8), torch.randn(60, 8)
    transcoder = SAE(SAEConfig(8, 30, k=3, transcoder=True)).eval()
    found = measure_sae(transcoder, Batch(x, y), batch_size=17)
    with torch.no_grad():
        expected = (y - transcoder(x)).double().square().sum() / (y - y.mean(0)).double().square().sum()
    assert found.fvu == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="pass Batch\\(rows, target\\)"):
        measure_sae(transcoder, x)
    timed = SAE(SAEConfig(8, 30, k=3, normalizer="timestep", time_width=4)).eval()
    with torch.no_grad():
        timed.modulation_bias.normal_()
        timed.modulation_weight.normal_()
    timestep = torch.arange(60.0)
    found = measure_sae(timed, Batch(x, None, timestep), batch_size=17)
    with torch.no_grad():
        expected = (x - timed.at_timestep(timestep)(x)).double().square().sum() / (
            x - x.mean(0)
        ).double().square().sum()
    assert found.fvu == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="depends on the timestep"):
        measure_sae(timed, x)


def test_densities_are_counted_by_decade():
    density = torch.tensor([0.0, 0.0, 2e-9, 3e-5, 0.02, 0.05, 0.5, 1.0])
    quality = SAEQuality(1000, 0.1, 0.9, 1.0, 1.6, 0.25, 0.25, density)
    assert quality.histogram() == [2 / 8, 1 / 8, 0, 1 / 8, 0, 0, 2 / 8, 2 / 8]
