"""The guard: what it notices, what it then does, and what it lets pass."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline import Activations, Context, Replace, attach
from sparsefeat.steering import load_instrument
from tests.erasure.test_suppression import PROMPTS, TEXT, dense_code, make_sae
from tests.pipeline.instruments import Edit, Watch
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
TWO = ["a fox", "an owl in a tree"]
CALL = {"num_inference_steps": 2, "height": 48, "width": 48}
W = torch.randn(64, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    return make_sae()


def mean_codes(pipe, sae, prompts, **call):
    """[steps, images, n_latents], of conditional rows, from the dense code."""
    watch = Watch(AT)
    with attach(pipe, watch):
        pixels(pipe, prompts, **call)
    found = []
    for rows, context in zip(watch.rows, watch.contexts, strict=True):
        z = dense_code(sae, rows).reshape(context.batch, context.positions, -1).mean(1)
        found.append(z[torch.tensor([c == "cond" for c, _ in context.entries])])
    return torch.stack(found)


def test_the_image_beyond_the_limit_is_the_one_without_a_prompt_and_the_other_is_itself(pipe, sae):
    first_step, second_step = mean_codes(pipe, sae, TWO) @ W.double()
    over = int(first_step.argmax())
    others = max(float(first_step[1 - over]), float(second_step[1 - over]))
    assert first_step[over] > others + 1e-3  # already at the first step, so that nothing of its prompt is to be left
    guard = sf.Guard(sae, W, (float(first_step[over]) + others) / 2, at=AT)
    plain, empty = pixels(pipe, TWO), pixels(pipe, ["", ""])
    with attach(pipe, guard) as run:
        guarded = pixels(pipe, TWO)
    assert run[guard] == (over,)
    assert np.array_equal(guarded[1 - over], plain[1 - over])
    assert np.abs(guarded[over] - empty[over]).max() <= 1e-4
    assert np.abs(plain[over] - empty[over]).max() > 1e-3


def test_once_over_the_limit_an_image_stays_without_its_prompt(pipe, sae):
    """Whatever its score is later: the third step's prediction is the unconditional one too."""
    scores = (mean_codes(pipe, sae, "a fox", steps=3) @ W.double())[:, 0]
    sign = 1 if scores[0] > scores[2] else -1  # so that the last step alone would not trip it
    guard = sf.Guard(sae, sign * W, float(sign * (scores[0] + scores[2])) / 2, at=AT)
    watch = Watch("unet")
    with attach(pipe, guard, watch):
        pixels(pipe, "a fox", steps=3)
    for rows, context in zip(watch.rows, watch.contexts, strict=True):
        assert [c for c, _ in context.entries] == ["uncond", "cond"]
        uncond, cond = rows.reshape(2, -1)
        assert torch.allclose(cond, uncond, atol=1e-6)
    assert len(watch.rows) == 3


@pytest.mark.parametrize("behind", [False, True], ids=["alone", "behind another"])
def test_the_guard_is_fishers_discriminant_with_a_limit_above_what_is_to_pass(pipe, sae, behind):
    before = (
        [Edit(lambda activations, context: Replace(0 * activations.rows), TEXT)] if behind else []
    )  # silences prompts
    (found,) = sf.guard_concept(pipe, [sae], "fox", PROMPTS, behind=before, margin=1.5, batch_size=2, **CALL).members()

    def codes(prompts, *before):  # [images, steps, n_latents], each image from a seed of its own
        with attach(pipe, *before) if before else nullcontext():
            each = [mean_codes(pipe, sae, p, seed=i, height=48, width=48)[:, 0] for i, p in enumerate(prompts)]
        return torch.stack(each)

    passing = codes([p for c, its in PROMPTS.items() if behind or c != "fox" for p in its], *before)
    first = passing[:, 0]
    mu, concept = first.mean(0), codes(PROMPTS["fox"])[:, 0].mean(0)
    covariance = (first - mu).T @ (first - mu) / len(first)
    ridge = 0.01 * covariance.diagonal().max() * torch.eye(64, dtype=torch.float64)
    v = torch.linalg.solve(covariance + ridge, concept - mu)
    w = v / (v @ (concept - mu))
    limit = 1.5 * float(((passing - mu) @ w).max())
    assert torch.allclose(found.discriminant.double(), w / limit, rtol=1e-2, atol=1e-3 * float(w.abs().max() / limit))
    for z in passing.flatten(0, 1):  # what is to pass does, by the margin
        s = float((z - mu) @ w)
        assert float(z @ found.discriminant.double()) - found.limit == pytest.approx(s / limit - 1, abs=1e-2)


def test_gradients_say_which_way_the_switch_would_go(sae):
    """Straight through: d(prediction) / d(rows) = (unconditional - conditional) d(w . z) / d(rows)."""
    at, root = (guard := sf.Guard(sae, W, -100.0, at=AT)).hookpoints()
    seen = {"condition": ("uncond", "cond"), "prompt_index": (0, 0), "batch": 2, "positions": 9, "grid": (3, 3)}
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prediction = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    along = torch.randn(9, 4, generator=torch.Generator().manual_seed(2))
    with torch.enable_grad():
        assert guard.at_hookpoint(Activations(x), Context(hookpoint=at, **seen)) is None
        delta = guard.at_hookpoint(Activations(prediction), Context(hookpoint=root, **seen)).rows
        (gradient,) = torch.autograd.grad((delta[9:] * along).sum(), [x])
    uncond, cond = prediction.flatten(2).mT
    assert torch.equal(delta[:9], torch.zeros(9, 4))
    assert torch.allclose(delta[9:], uncond - cond, atol=1e-6)
    y = x.detach().double().requires_grad_()
    s = dense_code(sae, y[1]).mean(0) @ W.double()
    (wanted,) = torch.autograd.grad(s * ((uncond - cond) * along).sum().double(), [y])
    assert torch.allclose(gradient.double(), wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_guard_is_kept_on_disk_with_what_it_stands_behind(sae, tmp_path):
    sf.Together(sf.Guard(sae, W, 0.5, "fox", at=AT), sf.Steer(sae, scale={1: 0.0}, at=AT)).save(tmp_path / "guard")
    again = load_instrument(tmp_path / "guard").members()[0]
    assert torch.equal(again.discriminant, W)
    assert (again.limit, again.concept, str(again.at)) == (0.5, "fox", AT)


def test_what_it_cannot_guard_is_refused(pipe, sae):
    with (
        attach(pipe, sf.Guard(sae, W, 1e9, at=AT)),
        pytest.raises(ValueError, match=r"no unconditional rows .* turn guidance on"),
    ):
        pixels(pipe, "a fox", guidance_scale=1.0)
    with pytest.raises(ValueError, match="limit=nan must be"):
        sf.Guard(sae, W, float("nan"), at=AT)
    with pytest.raises(ValueError, match=r"discriminant \[3\] must be \[64\]"):
        sf.Guard(sae, W[:3], 1.0, at=AT)
    text = make_sae(at="text_encoder.encoder.layers.1")
    for saes, target, said in (
        ([text], "fox", r"saes\[0\] is of text_encoder.* no block of the denoiser"),
        (sae, "fox", "must be a list of the SAEs"),
        ([sae], ["fox"], r"target=\['fox'\] must be a key"),
        ([sae], "bear", "target='bear' must be a key"),
        ([], "fox", r"saes=\[\] must be a list of the SAEs"),
    ):
        with pytest.raises(ValueError, match=said):
            sf.guard_concept(pipe, saes, target, PROMPTS, **CALL)
    with pytest.raises(ValueError, match=r"prompts have one picture without 'fox', .*give two at least"):
        sf.guard_concept(pipe, [sae], "fox", {"fox": ["a fox"], "cat": ["a cat"]}, **CALL)
    with pytest.raises(TypeError, match=r"saes\[0\] is 'x', not an SAE"):
        sf.guard_concept(pipe, ["x"], "fox", PROMPTS, **CALL)
    with pytest.raises(ValueError, match="no SAE's latents tell 'fox' from the other pictures"):
        sf.guard_concept(pipe, [sae], "fox", PROMPTS, margin=1e9, **CALL)
