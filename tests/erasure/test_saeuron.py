"""SAeUron's statistics, scores, selection and edit, re-derived in fp64 from dense codes."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch

import sparsefeat
from sparsefeat.erasure import Erase, Selection, random_latents, select
from sparsefeat.features import Statistics, collect_statistics
from sparsefeat.pipeline import Activations, Context, Hookpoint, attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import load_instrument, saved
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
D, N = 32, 256
CALL = {"num_inference_steps": 2, "height": 48, "width": 48}
PROMPTS = {"fox": ["a fox", "fox b"], "cat": ["a cat"], "dog": ["dog c", "e dog", "dog"]}


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=D, n_latents=N, k=6, hookpoint=AT)).requires_grad_(False).eval()


def dense_code(sae, x):
    pre = (x.double() - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    kept = pre.topk(sae.config.k, -1)
    return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu())


TIMESTEPS = (981.0, 481.0, 1.0)


@pytest.fixture(scope="module")
def data(sae):
    """Statistics of made-up rows, and the dense codes they are of: concept -> timestep -> [rows, N]."""
    statistics, dense = Statistics(["fox", "cat", "dog"], N), {}
    generator = torch.Generator().manual_seed(3)
    for c, (concept, rows) in enumerate({"fox": 80, "cat": 50, "dog": 120}.items()):
        for t in TIMESTEPS:
            x = torch.randn(rows, D, generator=generator) + torch.randn(D, generator=generator)
            statistics.add(sae.encode(x), torch.full((rows,), c), t)
            dense.setdefault(concept, {})[t] = dense_code(sae, x)
    return statistics, dense


def published(dense, concept, t, percentile):
    """Scores, selected latents, mu(c) and thresholds, by the formulas."""
    mu = {c: of_t[t].mean(0).numpy() for c, of_t in dense.items()}
    others = torch.cat([of_t[t] for c, of_t in dense.items() if c != concept]).mean(0).numpy()
    s = mu[concept] / (mu[concept].sum() + 1e-8) - others / (others.sum() + 1e-8)
    chosen = np.flatnonzero(s > np.quantile(s, percentile / 100))
    return s, chosen, mu[concept], np.mean(list(mu.values()), axis=0)


@pytest.mark.parametrize("percentile", [99.5, 98.0, 90.0])
@pytest.mark.parametrize("magnitude", ["mean", "scale"])
def test_selection_factors_and_thresholds_are_those_of_the_paper(data, percentile, magnitude):
    statistics, dense = data
    for concept in ("fox", "dog"):
        for t in TIMESTEPS:
            _, chosen, mu, m = published(dense, concept, t, percentile)
            found = select(statistics, concept, t, percentile=percentile, gamma=-3.0, magnitude=magnitude)
            assert found.latents.tolist() == chosen.tolist()
            factor = -3 * mu[chosen] if magnitude == "mean" else np.full(len(chosen), -3.0)
            np.testing.assert_allclose(found.factor, factor, rtol=1e-4)
            np.testing.assert_allclose(found.threshold, m[chosen], rtol=1e-4)


def test_the_n_highest_scores_are_selected_when_asked_for(data):
    statistics, dense = data
    s, *_ = published(dense, "fox", 481.0, 99)
    found = select(statistics, "fox", 481.0, n_latents=5)
    assert found.latents.tolist() == sorted(np.argsort(-s, kind="stable")[:5].tolist())
    everything = select(statistics, "fox", 481.0, n_latents=N)
    assert everything.latents.tolist() == np.flatnonzero(s > 0).tolist()  # no latent that speaks against the concept


def test_a_concept_that_differs_from_no_other_is_said_to_erase_nothing(sae):
    statistics = Statistics(["fox", "cat"], N)
    x = torch.randn(40, D, generator=torch.Generator().manual_seed(5))
    for concept in (0, 1):
        statistics.add(sae.encode(x), torch.full((40,), concept), 481.0)
    with pytest.warns(UserWarning, match="nothing will be erased: none is more fox than"):
        assert not len(Erase.from_statistics(sae, statistics, "fox", n_latents=3).selections[481.0])


def at(timestep, condition=("uncond", "cond"), positions=7):
    return Context(
        hookpoint=Hookpoint.parse(AT),
        step=0,
        n_steps=1,
        fraction=0.0,
        condition=condition,
        prompt_index=(0,) * len(condition),
        grid=(1, positions),
        batch=len(condition),
        positions=positions,
        _timestep=timestep,
    )


def some_rows(seed=7, batch=2, positions=7):
    return 2 * torch.randn(batch, positions, D, generator=torch.Generator().manual_seed(seed))


def published_delta(sae, dense, concept, t, x, gamma, percentile=97.0, magnitude="mean"):
    _, chosen, mu, m = published(dense, concept, t, percentile)
    z = dense_code(sae, x)
    edited = z.clone()
    for i in chosen.tolist():
        factor = gamma * mu[i] if magnitude == "mean" else gamma
        edited[..., i] = torch.where(z[..., i] > m[i], factor * z[..., i], z[..., i])
    assert (edited != z).any()  # the case says something
    return (edited - z) @ sae.W_dec.double()


def rows_of(erase, x, context):
    delta = erase.at_hookpoint(Activations(x), context)
    return torch.zeros_like(x) if delta is None else delta.rows.view(x.shape)


@pytest.mark.parametrize("magnitude", ["mean", "scale"])
def test_t4_the_factor_multiplies_the_activation_and_its_mean(sae, data, magnitude):
    statistics, dense = data
    erase = Erase.from_statistics(sae, statistics, "fox", percentile=97.0, gamma=-5.0, magnitude=magnitude)
    for t in TIMESTEPS:
        x = some_rows()
        expected = published_delta(sae, dense, "fox", t, x, -5.0, magnitude=magnitude)
        torch.testing.assert_close(rows_of(erase, x, at(t)).double(), expected, rtol=1e-4, atol=1e-4)


def test_activations_up_to_the_threshold_are_left_alone(sae):
    x = some_rows(positions=200)
    z = dense_code(sae, x)
    latent = int((z > 0).flatten(0, 1).sum(0).argmax())
    middle = float(z[..., latent][z[..., latent] > 0].median())
    chosen = Selection(torch.tensor([latent]), torch.tensor([-3.0]), torch.tensor([middle]))
    above = z[..., latent] > chosen.threshold.double()
    assert 0 < int(above.sum()) < int((z[..., latent] > 0).sum())  # the case says something
    change = torch.where(above, -4 * z[..., latent], 0.0)
    out = rows_of(Erase(sae, {1.0: chosen}), x, at(1.0, positions=200)).double()
    near = (z[..., latent] - middle).abs() < 1e-4  # a value that rounds to the threshold may fall on either side
    expected = change[..., None] * sae.W_dec[latent].double()
    torch.testing.assert_close(out[~near], expected[~near], rtol=1e-4, atol=1e-4)


def test_t3_the_released_code_reflects_every_row_about_its_reconstruction(sae, data):
    statistics, dense = data
    options = {"percentile": 97.0, "gamma": -5.0}
    keep = Erase.from_statistics(sae, statistics, "fox", **options)
    reflect = Erase.from_statistics(sae, statistics, "fox", error="saeuron_released", **options)
    x = some_rows()
    z = dense_code(sae, x)
    reconstruction = z @ sae.W_dec.double() + sae.b_out.double()
    delta = published_delta(sae, dense, "fox", 1.0, x, -5.0)
    # The released code: x' = x_hat' + (x_hat - x), with x_hat' the reconstruction of the edited code.
    released = (reconstruction + delta) + (reconstruction - x.double())
    ours = x.double() + rows_of(reflect, x, at(1.0)).double()
    torch.testing.assert_close(ours, released, rtol=1e-4, atol=1e-4)
    distance = (ours - x.double() - rows_of(keep, x, at(1.0)).double()).norm(dim=-1)
    torch.testing.assert_close(distance, 2 * (x.double() - reconstruction).norm(dim=-1), rtol=1e-4, atol=1e-4)
    assert (distance > 0).all()


@pytest.mark.parametrize(("condition", "signs"), [("both", (1, 1)), ("cond", (0, 1)), ("uncond", (1, 0))])
@pytest.mark.parametrize("error", ["keep", "saeuron_released"])
def test_t7_both_halves_of_the_guidance_batch_are_edited_unless_one_is_named(sae, data, condition, signs, error):
    options = {"percentile": 97.0, "gamma": -5.0, "error": error}
    both = Erase.from_statistics(sae, data[0], "fox", **options)
    one = Erase.from_statistics(sae, data[0], "fox", condition=condition, **options)
    assert both.condition == "both"
    x = some_rows()
    expected = rows_of(both, x, at(1.0)) * torch.tensor(signs)[:, None, None]
    torch.testing.assert_close(rows_of(one, x, at(1.0)), expected, rtol=1e-4, atol=1e-5)


def test_a_step_uses_the_statistics_of_the_nearest_timestep(sae, data):
    erase = Erase.from_statistics(sae, data[0], "fox", percentile=97.0)
    x = some_rows()
    for timestep, nearest in ((999, 981.0), (732, 981.0), (731, 481.0), (240, 1.0), (0, 1.0)):
        assert erase.selection_at(timestep) is erase.selections[nearest]
        assert torch.equal(rows_of(erase, x, at(timestep)), rows_of(erase, x, at(nearest)))


def test_several_concepts_are_erased_together_and_the_later_wins(sae, data):
    statistics, _ = data
    how = {"percentile": 90.0, "gamma": -2.0}
    together = Erase.from_statistics(sae, statistics, ["fox", "dog"], **how)
    shared = 0
    for t in TIMESTEPS:
        fox, dog = select(statistics, "fox", t, **how), select(statistics, "dog", t, **how)
        factors = dict(zip(fox.latents.tolist(), fox.factor.tolist(), strict=True))
        shared += len(set(factors) & set(dog.latents.tolist()))
        factors |= dict(zip(dog.latents.tolist(), dog.factor.tolist(), strict=True))
        assert together.selections[t].latents.tolist() == sorted(factors)
        assert together.selections[t].factor.tolist() == [factors[i] for i in sorted(factors)]
    assert shared  # the case says something
    united = Erase.from_statistics(sae, statistics, "fox", **how).union(
        Erase.from_statistics(sae, statistics, "dog", **how)
    )
    assert united.concepts == ("fox", "dog")
    for t in TIMESTEPS:
        assert torch.equal(united.selections[t].factor, together.selections[t].factor)


@pytest.mark.parametrize("call", [{}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2, "height": 48, "width": 80}])
def test_erasing_with_factor_one_gives_the_same_image_bit_for_bit(pipe, sae, data, call):
    erase = Erase.from_statistics(sae, data[0], "fox", percentile=50.0, gamma=1.0, magnitude="scale")
    prompts = ["a fox", "a cat"]
    before = pixels(pipe, prompts, **call)
    with attach(pipe, erase):
        assert (pixels(pipe, prompts, **call) == before).all()


def test_fitting_on_a_pipeline_is_collecting_and_selecting(pipe, sae):
    erase = Erase.fit(pipe, sae, "fox", PROMPTS, n_latents=4, gamma=-10.0, **CALL)
    statistics = collect_statistics(pipe, sae, PROMPTS, **CALL)
    again = Erase.from_statistics(sae, statistics, "fox", n_latents=4, gamma=-10.0)
    for t, selection in erase.selections.items():
        assert torch.equal(selection.latents, again.selections[t].latents)
        torch.testing.assert_close(selection.factor, again.selections[t].factor)
    before = pixels(pipe, "a fox")
    with attach(pipe, erase):
        once, twice = pixels(pipe, "a fox"), pixels(pipe, "a fox")  # T8: no counter that runs on
        longer = pixels(pipe, "a fox", steps=3)  # another number of steps than the statistics
    assert (once != before).any()
    assert (once == twice).all()
    assert np.isfinite(longer).all()
    assert (pixels(pipe, "a fox") == before).all()


def test_more_latents_than_there_are_is_said(sae, data):
    statistics, dense = data
    mu = {c: of_t[TIMESTEPS[0]].mean(0) for c, of_t in dense.items()}
    rest = torch.cat([dense[c][TIMESTEPS[0]] for c in ("cat", "dog")]).mean(0)
    positive = int((mu["fox"] / mu["fox"].sum() > rest / rest.sum()).sum())
    assert 2 < positive < N
    with pytest.warns(UserWarning, match=rf"n_latents={N} asks for more than there are: (\d+ to )?\d+ latents"):
        erase = Erase.from_statistics(sae, statistics, "fox", n_latents=N)
    assert len(erase.selection_at(TIMESTEPS[0])) == positive
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Erase.from_statistics(sae, statistics, "fox", n_latents=2)


def test_a_saved_erasure_does_the_same(pipe, sae, data, tmp_path):
    erase = Erase.from_statistics(
        sae, data[0], ["fox", "cat"], percentile=97.0, gamma=-5.0, error="saeuron_released", steps=[0], condition="cond"
    )
    erase.save(tmp_path)
    loaded = load_instrument(tmp_path)
    assert isinstance(loaded, Erase)
    assert (loaded.concepts, loaded.error, loaded.condition, loaded.window) == (
        ("fox", "cat"),
        "saeuron_released",
        "cond",
        erase.window,
    )
    with attach(pipe, erase):
        expected = pixels(pipe)
    with attach(pipe, loaded):
        assert (pixels(pipe) == expected).all()


def test_a_saved_erasure_loads_in_a_program_that_has_not_imported_its_package(sae, data, tmp_path, monkeypatch):
    Erase.from_statistics(sae, data[0], "fox", percentile=97.0).save(tmp_path)
    # As a new program starts: nothing registered, and the package not imported.
    monkeypatch.setattr(saved, "_KINDS", {})
    monkeypatch.setattr(sparsefeat, "erasure", sparsefeat.erasure)  # puts it back afterwards
    for name in [name for name in sys.modules if name.startswith("sparsefeat.erasure")]:
        monkeypatch.delitem(sys.modules, name)
    assert type(load_instrument(tmp_path)).__name__ == "Erase"


def test_the_control_has_as_many_other_latents_with_the_same_factors(sae, data):
    statistics, _ = data
    erase = Erase.from_statistics(sae, statistics, "fox", n_latents=3, gamma=-5.0)
    erased = {i for s in erase.selections.values() for i in s.latents.tolist()}
    control, firing = random_latents(erase, seed=0), random_latents(erase, seed=0, statistics=statistics)
    for t in TIMESTEPS:
        for other in (control, firing):
            assert len(other.selections[t]) == 3
            assert not erased & set(other.selections[t].latents.tolist())
            assert torch.equal(other.selections[t].factor, erase.selections[t].factor)
        assert torch.equal(control.selections[t].threshold, erase.selections[t].threshold)
        drawn = firing.selections[t].latents
        assert (statistics.count("fox")[drawn] > 0).all()
        m = torch.stack([statistics.mean(c, t)[drawn] for c in ("fox", "cat", "dog")]).mean(0)
        torch.testing.assert_close(firing.selections[t].threshold.double(), m, rtol=1e-5, atol=1e-7)
    # The same latent throughout the schedule, and another draw for another seed.
    again, other = random_latents(erase, seed=0), random_latents(erase, seed=1)
    assert all(torch.equal(again.selections[t].latents, control.selections[t].latents) for t in TIMESTEPS)
    assert any(not torch.equal(other.selections[t].latents, control.selections[t].latents) for t in TIMESTEPS)
    assert (control.error, control.condition, control.at) == (erase.error, erase.condition, erase.at)


def test_mistakes_are_refused(sae, data):
    statistics, _ = data
    with pytest.raises(ValueError, match="concept='cow' is not in these statistics, which have fox, cat, dog"):
        Erase.from_statistics(sae, statistics, "cow")
    alone = Statistics(["fox"], N, timesteps=[1])
    with pytest.raises(ValueError, match="compares a concept with others, so collect prompts without it too"):
        Erase.from_statistics(sae, alone, "fox")
    with pytest.raises(ValueError, match="statistics are of 12 latents, the SAE has 256"):
        Erase.from_statistics(sae, Statistics(["a", "b"], 12), "a")
    with pytest.raises(ValueError, match="the statistics are empty"):
        Erase.from_statistics(sae, Statistics(["a", "b"], N), "a")
    with pytest.raises(ValueError, match=r'error=\'flip\' is not known; use "keep" or "saeuron_released"'):
        Erase.from_statistics(sae, statistics, "fox", error="flip")
    with pytest.raises(ValueError, match="magnitude='both' is not known"):
        Erase.from_statistics(sae, statistics, "fox", magnitude="both")
    with pytest.raises(ValueError, match="n_latents=0 must be a whole number from 1 to 256"):
        Erase.from_statistics(sae, statistics, "fox", n_latents=0)
    with pytest.raises(ValueError, match="adds what it should erase to one half"):
        Erase.from_statistics(sae, statistics, "fox", condition="cond+uncond-")
    with pytest.raises(ValueError, match=r"selections=\{\} is empty"):
        Erase(sae, {})
    out = Selection(torch.tensor([N]), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"selections\[1\] names latents 256 to 256; this SAE has latents 0 to 255"):
        Erase(sae, {1: out})
    erase = Erase.from_statistics(sae, statistics, "fox", percentile=0)
    with pytest.raises(ValueError, match="erase fewer latents"):
        random_latents(erase, seed=0)
