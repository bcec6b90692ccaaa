"""APP, clamp, replace-where and the lancet, each against a few lines of its own arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

import sparsefeat as sf
from sparsefeat.erasure import ConceptLancet, PosteriorAttenuation, ReplaceWhere, clamp_latents
from sparsefeat.erasure.posterior_attenuation import Histograms
from sparsefeat.features import Statistics
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import load_instrument
from tests.families import families
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
D, N = 32, 64
TEXT = "text_encoder.encoder.layers.1"
PROMPTS = {"fox": ["a fox", "fox b"], "cat": ["a cat"], "dog": ["dog c"]}


def make_sae(d=D, at=AT, **options):
    torch.manual_seed(1)
    return (
        SAE(SAEConfig(**{"d_model": d, "n_latents": N, "k": 6, "hookpoint": at, **options}))
        .requires_grad_(False)
        .eval()
    )


def dense_code(sae, x):
    pre = (x.double() - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    kept = pre.topk(sae.config.k, -1)
    return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def rows_before_and_after(pipe, instrument, at=AT, steps=1, **call):
    before, after = Watch(at), Watch(at)
    with attach(pipe, before, instrument, after):
        pixels(pipe, "a fox", steps=steps, output_type="latent", **call)
    return before, after


def test_posteriors_are_those_of_the_counted_histograms(sae):
    counted, values = Histograms(["fox", "cat"], N), {}
    generator = torch.Generator().manual_seed(5)
    for c, (concept, n) in enumerate({"fox": 150, "cat": 90}.items()):
        x = 2 * torch.randn(n, D, generator=generator) + torch.randn(D, generator=generator)
        counted.add(sae.encode(x), torch.full((n,), c), 1.0)
        values[concept] = dense_code(sae, x)
    latents = torch.arange(N)

    def place(z):
        return math.floor(8 * (math.log10(z) + 4) + 1e-9)

    for prior in (None, 0.2):
        found = counted.posterior("fox", latents, prior)
        priors = {"fox": 0.5, "cat": 0.5} if prior is None else {"fox": prior, "cat": 1 - prior}
        for latent in range(0, N, 7):
            for z in values["fox"][:, latent].tolist()[:30]:
                if z > 0:
                    share = {
                        c: priors[c] * sum(v > 0 and place(v) == place(z) for v in of[:, latent].tolist()) / len(of)
                        for c, of in values.items()
                    }
                    wanted = share["fox"] / sum(share.values())
                    assert float(found[latent, place(z) + 1]) == pytest.approx(wanted, abs=1e-6)
    assert float(found[:, -1].max()) == 0  # nobody was ever so active


@pytest.mark.parametrize("normalizer", ["none", "unit_norm"])
def test_app_attenuates_by_the_posterior(pipe, normalizer):
    sae = make_sae(normalizer=normalizer)
    latents = torch.tensor([3, 11, 40])
    table = torch.rand(3, 66, generator=torch.Generator().manual_seed(2))
    before, after = rows_before_and_after(pipe, PosteriorAttenuation(sae, latents, table, condition="both"))
    x = before.rows[0].double()
    norms = x.norm(dim=1, keepdim=True) if normalizer == "unit_norm" else torch.ones(len(x), 1, dtype=torch.float64)
    z = dense_code(sae, sae.normalize(before.rows[0]))[:, latents]
    wanted = x.clone()
    for row in range(len(x)):
        for f in range(3):
            if z[row, f] > 0:
                place = min(max(math.floor(8 * (math.log10(z[row, f]) + 4)) + 1, 0), 65)
                wanted[row] -= table[f, place].double() * z[row, f] * sae.W_dec[latents[f]].double() * norms[row]
    assert (wanted - x).abs().max() > 1e-3
    assert (after.rows[0].double() - wanted).abs().max() <= 1e-4


def test_app_is_fitted_and_kept_on_disk(pipe, sae, tmp_path):
    call = {"num_inference_steps": 2, "height": 48, "width": 48}
    fitted = PosteriorAttenuation.fit(pipe, sae, "fox", PROMPTS, n_latents=6, at=AT, steps=(0.0, 0.9), **call)
    assert 0 < len(fitted.latents) <= 6
    assert float(fitted.posterior.max()) > 1 / 3
    fitted.save(tmp_path / "app")
    loaded = load_instrument(tmp_path / "app")
    drawn = [rows_before_and_after(pipe, one, steps=2)[1].rows for one in (fitted, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    with pytest.raises(ValueError, match="concept='bear' must be a key"):
        PosteriorAttenuation.fit(pipe, sae, "bear", PROMPTS)
    with pytest.raises(ValueError, match="posterior holds NaN"):
        PosteriorAttenuation(sae, [1], torch.full((1, 66), float("nan")))


def test_clamping_holds_the_concepts_latents_at_the_others_mean(pipe, sae):
    statistics = Statistics(["fox", "cat"], N)
    generator = torch.Generator().manual_seed(3)
    dense = []
    for c in range(2):
        x = torch.randn(60, D, generator=generator) + torch.randn(D, generator=generator)
        statistics.add(sae.encode(x), torch.full((60,), c), 5.0)
        dense.append(dense_code(sae, x))
    mu = [of.mean(0) for of in dense]
    scores = mu[0] / mu[0].sum() - mu[1] / mu[1].sum()
    chosen = scores.argsort(descending=True)[:5]
    steer = clamp_latents(sae, statistics, "fox", n_latents=5, factor=0.5)
    active = (dense[1] > 0).sum(0).clamp(min=1)
    high = 0.5 * dense[1].sum(0) / active
    before, after = rows_before_and_after(pipe, steer)
    z = dense_code(sae, before.rows[0])[:, chosen]
    wanted = before.rows[0].double() + (z.minimum(high[chosen]) - z) @ sae.W_dec[chosen].double()
    assert (after.rows[0].double() - wanted).abs().max() <= 1e-4
    with pytest.raises(ValueError, match="factor=nan"):
        clamp_latents(sae, statistics, "fox", factor=float("nan"))


@pytest.mark.parametrize("size", [(48, 48), (40, 72)])
def test_a_row_where_it_fires_becomes_the_nearest_where_it_does_not(pipe, sae, size, tmp_path):
    latents = {4: 0.1, 21: 0.0}
    instrument = ReplaceWhere(sae, latents)
    instrument.save(tmp_path / "where")
    for one in (instrument, load_instrument(tmp_path / "where")):
        before, after = rows_before_and_after(pipe, one, height=size[0], width=size[1])
        height, width = before.contexts[0].grid
        x, n = before.rows[0], height * width
        code = dense_code(sae, x)
        fires = (code[:, 4] > 0.1) | (code[:, 21] > 0)
        assert 0 < int(fires[n:].sum()) < n
        wanted = x.clone()
        for p in range(n):
            if fires[n + p]:
                free = [q for q in range(n) if not fires[n + q]]
                apart = [(q // width - p // width) ** 2 + (q % width - p % width) ** 2 for q in free]
                wanted[n + p] = x[n + free[apart.index(min(apart))]]
        assert (after.rows[0] - wanted).abs().max() <= 1e-5 * x.abs().max()
        assert torch.equal(after.rows[0][:n], x[:n])  # the unconditional rows
        assert torch.equal(after.rows[0][n:][~fires[n:]], x[n:][~fires[n:]])


def test_or_the_unconditional_row_at_the_same_place(pipe, sae):
    before, after = rows_before_and_after(pipe, ReplaceWhere(sae, {4: 0.0}, source="uncond"))
    x = before.rows[0]
    n = len(x) // 2
    fires = dense_code(sae, x)[n:, 4] > 0
    wanted = torch.where(fires[:, None], x[:n], x[n:])
    assert bool(fires.any())
    assert (after.rows[0][n:] - wanted).abs().max() <= 1e-5 * x.abs().max()


def test_passes_apart_have_no_unconditional_row_and_patches_work_in_every_family(sae):
    for name, at in (("flux", "transformer.transformer_blocks.0"), ("sd3", "transformer.transformer_blocks.0")):
        family = families()[name]
        pipe = family.build()
        own = make_sae(16, at=at)
        plain = family.call(pipe, ["a fox"], guidance=True)
        with attach(pipe, ReplaceWhere(own, dict.fromkeys(range(0, N, 3), 0.0))):
            assert not torch.equal(family.call(pipe, ["a fox"], guidance=True), plain)
        if name == "flux":
            with (
                pytest.raises(ValueError, match="has no unconditional rows"),
                attach(pipe, ReplaceWhere(own, dict.fromkeys(range(N), 0.0), source="uncond")),
            ):
                family.call(pipe, ["a fox"], guidance=True)


def test_replace_where_refuses_in_a_sentence(sae):
    with pytest.raises(ValueError, match="at least one latent"):
        ReplaceWhere(sae, {})
    with pytest.raises(ValueError, match="choose in 0 to 63"):
        ReplaceWhere(sae, {64: 0.0})
    with pytest.raises(ValueError, match="must be 'cond'"):
        ReplaceWhere(sae, {1: 0.0}, source="uncond", condition="both")
    with pytest.raises(ValueError, match=r"latents\[1\]=nan"):
        ReplaceWhere(sae, {1: float("nan")})


def test_the_lancet_takes_a_directions_share_out(pipe, tmp_path):
    torch.manual_seed(4)
    basis = torch.linalg.qr(torch.randn(D, D))[0][:4]  # orthogonal: the shares are projections
    names = ("fox", "cat", "dog", "snow")
    directions = {name: 3 * one for name, one in zip(names, basis, strict=True)}
    lancet = ConceptLancet(directions, "fox", "cat", at=AT, k=4, strength=0.7)
    lancet.save(tmp_path / "lancet")
    for one in (lancet, load_instrument(tmp_path / "lancet")):
        before, after = rows_before_and_after(pipe, one)
        x = before.rows[0].double()
        share = (x @ basis[0].double()).clamp(min=0)
        share[: len(x) // 2] = 0  # unconditional
        wanted = x + 0.7 * share[:, None] * (basis[1] - basis[0]).double()
        assert (after.rows[0].double() - wanted).abs().max() <= 1e-4 * x.abs().max()
    assert float(share.max()) > 0


def test_the_lancets_directions_are_means_of_a_text_encoders_layer(pipe):
    lancet = ConceptLancet.fit(pipe, TEXT, PROMPTS, "fox", "dog")
    means = []
    for prompts in PROMPTS.values():
        of = []
        for prompt in prompts:
            tokens = pipe.tokenizer(prompt, padding="max_length", max_length=16, return_tensors="pt")
            with torch.no_grad():
                hidden = pipe.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states[2][0]
            own = len(pipe.tokenizer(prompt).input_ids)
            of.append(hidden[1:own].double().mean(0))  # the end mark is counted with the prompt
        means.append(torch.stack(of).mean(0))
    directions = torch.stack(means) - torch.stack(means).mean(0)
    wanted = directions / directions.norm(dim=1, keepdim=True)
    assert (lancet.atoms.double() - wanted).abs().max() <= 1e-4
    plain = pixels(pipe, "a fox", steps=1, output_type="latent")
    with attach(pipe, lancet):
        assert not torch.equal(pixels(pipe, "a fox", steps=1, output_type="latent"), plain)
    with pytest.raises(ValueError, match="remove='bear' is no direction"):
        ConceptLancet.fit(pipe, TEXT, PROMPTS, "bear")
    with pytest.raises(ValueError, match="not zero"):
        ConceptLancet({"fox": torch.zeros(4)}, "fox", at=AT)
    with (
        pytest.raises(ValueError, match="needs activations of width 5"),
        attach(pipe, ConceptLancet({"a": torch.ones(5)}, "a", at=sf.Hookpoint(AT))),
    ):
        pass
