"""Factorisations as SAEs, beside numpy, scipy and what they must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsefeat as sf
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
ROWS = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) @ torch.randn(
    24, 24, generator=torch.Generator().manual_seed(1)
)


def test_pca_is_that_of_numpy():
    sae = sf.factorise(ROWS, 5)
    wide = ROWS.double().numpy()
    centred = wide - wide.mean(0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    expected = (left[:, :5] * values[:5]) @ right[:5] + wide.mean(0)
    np.testing.assert_allclose(sae.decode(sae.encode(ROWS)).numpy(), expected, atol=2e-4)
    assert np.allclose(np.abs((sae.W_dec.numpy() * right[:5]).sum(1)), 1, atol=1e-4)


@pytest.mark.parametrize("is_plain", [True, False])
def test_codes_of_nmf_are_those_of_scipy(is_plain):
    optimize = pytest.importorskip("scipy.optimize")
    rows = ROWS.abs() if is_plain else ROWS
    sae = sf.factorise(rows, 6, "nmf")
    codes = sae.encode(rows[:20]).dense()
    parts = torch.cat([sae.W_enc + sae.W_dec, sae.W_enc - sae.W_dec], 1).double().numpy() / 2
    assert (parts >= -1e-6).all()
    assert (sae.b_pre == 0).all() == is_plain
    for row, code in zip(rows[:20], codes, strict=True):
        around = (row - sae.b_pre).double().numpy()
        wanted, _ = optimize.nnls(parts.T, np.concatenate([np.maximum(around, 0), np.maximum(-around, 0)]))
        np.testing.assert_allclose(code, wanted, atol=2e-3 * max(wanted.max(), 1))


def test_nmf_finds_parts_that_are_there():
    generator = torch.Generator().manual_seed(2)
    parts = torch.zeros(4, 20)
    for i in range(4):
        parts[i, 5 * i : 5 * i + 5] = torch.rand(5, generator=generator) + 0.5
    codes = torch.rand(200, 4, generator=generator) * (torch.rand(200, 4, generator=generator) < 0.5)
    sae = sf.factorise(codes @ parts, 4, "nmf")
    cosines = torch.nn.functional.normalize(parts, dim=1) @ torch.nn.functional.normalize(sae.W_dec, dim=1).T
    assert (cosines.amax(1) > 0.98).all()
    assert sorted(cosines.argmax(1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["pca", "nmf"])
def test_they_are_recorded_steered_and_saved_like_an_sae(method, tmp_path):
    pipe = tiny_sd()
    collect = sf.CollectActivations(AT)
    with sf.attach(pipe, collect) as run:
        pixels(pipe, ["a fox", "a cat"])
    (collected,) = run[collect].values()
    rows = collected.rows
    sae = sf.factorise(rows, 4, method, hookpoint=AT)
    sae.save(tmp_path / "sae")
    again = sf.load_sae(tmp_path / "sae")
    assert torch.equal(again.encode(rows[:7]).dense(), sae.encode(rows[:7]).dense())
    record = sf.Record(again)
    with sf.attach(pipe, record) as run:
        before = pixels(pipe)
    top = run[record].top(2)
    assert top[0].score > 0
    latent = top[0].latent
    with sf.attach(pipe, sf.Steer(again, scale={latent: 1.0})):
        assert (pixels(pipe) == before).all()
    seen = []

    class Watch(sf.Instrument):
        def hookpoints(self):
            return (sf.Hookpoint(AT),)

        def at_hookpoint(self, activations, context):
            seen.append(activations.rows[-len(activations.rows) // 2 :].clone())  # the conditional half

    with sf.attach(pipe, Watch(), sf.Steer(again, scale={latent: 0.0}), Watch()):
        pixels(pipe, steps=1)
    value = again.encode(seen[0]).dense()[:, latent]
    torch.testing.assert_close(seen[0] - value[:, None] * again.W_dec[latent], seen[1], rtol=1e-3, atol=1e-4)


def test_importance_of_a_sum_is_the_share_of_each_term():
    sae = sf.factorise(ROWS, 3)
    sample = sae.b_pre + torch.tensor([2.0, 1.0, 3.0]) @ sae.W_dec
    weights = sae.W_dec * torch.tensor([1.0, 2.0, 0.0])[:, None]

    def score(x):  # (2 m_0 + 2 m_1) and nothing of the third
        return ((x - sae.b_pre) @ weights.T).sum((1, 2))

    found = sf.sobol_importance(sae, sample[None, None], score, designs=512)
    torch.testing.assert_close(found, torch.tensor([0.5, 0.5, 0.0]), atol=0.05, rtol=0)


def test_what_is_wrong_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="method='ica'"):
        sf.factorise(ROWS, 3, "ica")
    with pytest.raises(ValueError, match="n_latents=25"):
        sf.factorise(ROWS, 25)
    with pytest.raises(ValueError, match="rows holds NaN"):
        sf.factorise(ROWS.clone().fill_(torch.nan), 3, "nmf")
    with pytest.raises(ValueError, match="rows has shape"):
        sf.factorise(ROWS[0], 3)
    sae = sf.factorise(ROWS.abs(), 3, "nmf")
    with pytest.raises(ValueError, match="factorise makes its dictionary"):
        sf.SAETrainer(sae.train(), ROWS, sf.TrainConfig(steps=1, batch_size=8))
    with pytest.raises(ValueError, match="pass k=8"):
        sf.SAEConfig(4, 8, "nnls", k=2)
    bad = ROWS[:3].abs().clone()
    bad[1, 0] = torch.nan
    code = sf.factorise(ROWS.abs(), 3, "nmf").encode(bad).values
    assert code[1].isnan().all()
    assert code[[0, 2]].isfinite().all()
