"""SLD against a DDIM loop of our own, and against Compose where the two formulas meet."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.assets import load_pipeline
from sparsefeat.erasure import safe_latent_diffusion
from sparsefeat.pipeline import attach
from sparsefeat.steering import Compose, ScoreEdit, load_instrument
from sparsefeat.steering.scores import SafeGuidance
from tests.families import families
from tests.tiny import tiny_sd, tiny_sdxl

STEPS = 4


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def draw(pipe, *instruments, prompt="a fox", steps=STEPS):
    call = {"num_inference_steps": steps, "height": 48, "width": 48, "guidance_scale": 5.0, "output_type": "latent"}
    call["generator"] = torch.Generator().manual_seed(1)
    if not instruments:
        return pipe(prompt, **call).images
    with attach(pipe, *instruments):
        return pipe(prompt, **call).images


def plain_sld(pipe, concept, *, scale, threshold, warmup, momentum, beta):
    """The published loop, written from its equations."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    c, nothing, unsafe = (pipe.encode_prompt(t, "cpu", 1, False)[0].detach() for t in ("a fox", "", concept))
    noise = torch.randn((1, 4, 12, 12), generator=torch.Generator().manual_seed(1), dtype=pipe.unet.dtype)
    z = noise * scheduler.init_noise_sigma
    nu = torch.zeros_like(z)
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            e_c, e_n, e_s = (pipe.unet(z, t, text)[0] for text in (c, nothing, unsafe))
        mu = torch.zeros_like(z)
        nearer = (e_c - e_s) < threshold
        mu[nearer] = torch.minimum((scale * (e_c - e_s)).abs(), torch.ones(()).to(z))[nearer]
        gamma = (e_s - e_n) * mu + momentum * nu
        nu = beta * nu + (1 - beta) * gamma
        guided = e_c - e_n - (gamma if i >= warmup else 0)
        z = scheduler.step(e_n + 5.0 * guided, t, z).prev_sample
    return z


@pytest.mark.parametrize(
    "setting",
    [
        {"scale": 3.0, "threshold": 0.02, "warmup": 1, "momentum": 0.5, "beta": 0.7},
        {"scale": 5000.0, "threshold": 1.0, "warmup": 0, "momentum": 0.4, "beta": 0.2},
    ],
)
def test_it_is_the_published_loop(setting):
    pipe = tiny_sd().to(torch.float64)  # a scale of 5,000 makes as much of what float32 rounds
    edit = safe_latent_diffusion("cat b", **setting)
    plain, wanted = draw(pipe), plain_sld(pipe, "cat b", **setting)
    for _ in range(2):  # the momentum of one call is not in the next
        found = draw(pipe, edit)
        assert (found - wanted).abs().max() <= 1e-4 * plain.abs().max()
    assert (wanted - plain).abs().max() >= 1e-2 * plain.abs().max()


def test_a_call_within_the_warm_up_says_that_nothing_was_changed(pipe, recwarn):
    plain = draw(pipe)
    with pytest.warns(
        UserWarning, match=r"this ScoreEdit did nothing .* SafeGuidance adds was 0 .*: look at warmup=10"
    ):
        assert torch.equal(draw(pipe, safe_latent_diffusion("a cat")), plain)
    recwarn.clear()
    assert not torch.equal(draw(pipe, safe_latent_diffusion("a cat", "max")), plain)
    draw(pipe, ScoreEdit(Compose({"a cat": 0.0})))  # as it was asked for
    assert not [one for one in recwarn if "did nothing" in str(one.message)]


def test_it_runs_in_autocast_where_the_prompts_own_encoding_is_rounded(pipe):
    edit = safe_latent_diffusion("cat b", "max")
    with torch.autocast("cpu", torch.bfloat16):
        plain, found = draw(pipe), draw(pipe, edit)
    assert (found - plain).abs().max() >= 1e-2 * plain.abs().max()


@pytest.mark.embedded
@pytest.mark.parametrize("prompt", ["a noto emoji of a soccer ball", "a fluent emoji of a light bulb"])
def test_a_prompt_whose_largest_elements_are_rounded_most_is_found_in_autocast(prompt):
    pipe = load_pipeline()
    with torch.autocast("cpu", torch.bfloat16), attach(pipe, safe_latent_diffusion("a fish", "max")):
        images = pipe(prompt, num_inference_steps=2, guidance_scale=3.0, output_type="latent").images
    assert images.isfinite().all()


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_where_all_elements_are_moved_it_is_negation(name):
    family = families()[name]
    pipe = tiny_sdxl() if name == "sdxl" else family.build()

    def with_it(rule):
        with attach(pipe, ScoreEdit(rule, steps=[1])):
            return family.call(pipe, ["a fox"], guidance=True)

    whole = SafeGuidance("cat b", scale=1e30, threshold=1e9, warmup=0, momentum=0.0)
    found, wanted = with_it(whole), with_it(Compose({"cat b": -1.0}))
    plain = family.call(pipe, ["a fox"], guidance=True)
    assert (found - wanted).abs().max() <= 1e-4 * plain.abs().max()
    assert not torch.equal(plain, wanted)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_in_autocast_the_concept_is_run_as_the_pipeline_runs_its_prompt(name):
    """A scheduler leaves latents in bfloat16 there, which weights in float32 are not given outside."""
    family = families()[name]
    pipe = family.build()
    none_is_nearer = ScoreEdit(SafeGuidance("cat b", scale=3.0, threshold=-1e9, warmup=0, momentum=0.0))
    with torch.autocast("cpu", torch.bfloat16):
        plain = family.call(pipe, ["a fox"], guidance=True)
        with attach(pipe, none_is_nearer):
            found = family.call(pipe, ["a fox"], guidance=True)
    assert torch.equal(found, plain)
    assert plain.isfinite().all()


def test_settings_are_the_published_and_kept_on_disk(pipe, tmp_path):
    rule = safe_latent_diffusion("cat", "strong").rule
    assert (rule.warmup, rule.scale, rule.threshold, rule.momentum, rule.beta) == (7, 2000, 0.025, 0.5, 0.7)
    edit = safe_latent_diffusion("cat b", warmup=1)
    drawn = draw(pipe, edit)
    edit.save(tmp_path / "sld")
    assert torch.equal(draw(pipe, load_instrument(tmp_path / "sld")), drawn)
    assert torch.equal(draw(pipe, safe_latent_diffusion("cat b", scale=0.0)), draw(pipe))


def test_wrong_inputs_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match="setting='huge' is not known"):
        safe_latent_diffusion("cat", "huge")
    with pytest.raises(ValueError, match="concept=' '"):
        safe_latent_diffusion(" ")
    with pytest.raises(ValueError, match="beta=2"):
        safe_latent_diffusion("cat", beta=2.0)
    with pytest.raises(ValueError, match="warmup=-1"):
        safe_latent_diffusion("cat", warmup=-1)
