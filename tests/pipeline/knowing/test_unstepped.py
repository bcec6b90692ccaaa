"""Samplers that do not step the pipeline's scheduler, or step it by a method of their own."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Watch
from tests.pipeline.state import everything
from tests.tiny import pixels, tiny_sd

BLOCK = "unet.mid_block.attentions.0"


@pytest.fixture
def sd():
    return tiny_sd()


def sample(pipe, timesteps, watch, *, passes=1):
    """A sampler of the user's own: an update without the scheduler, `passes` runs of the model at each timestep."""
    with torch.no_grad(), attach(pipe, watch) as run, run.call(["a fox"], guidance=passes > 1):
        embeds, _ = pipe.encode_prompt("a fox", "cpu", 1, False)
        latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for timestep in timesteps:
            for _ in range(passes):
                noise = pipe.unet(latent, timestep.clone(), encoder_hidden_states=embeds).sample
            latent = latent - 0.1 * noise


@pytest.mark.parametrize("passes", [1, 2])
def test_without_a_step_of_the_scheduler_the_place_is_that_of_the_timestep(sd, passes):
    sd.scheduler.set_timesteps(4)
    watch = Watch(BLOCK)
    sample(sd, sd.scheduler.timesteps, watch, passes=passes)
    assert [c.step for c in watch.contexts] == [step for step in range(4) for _ in range(passes)]
    assert {c.n_steps for c in watch.contexts} == {4}
    assert [c.step for c in watch.ended] == [0, 1, 2]  # that the last is over nothing says


def test_a_timestep_that_is_none_of_the_loops_has_no_step(sd):
    sd.scheduler.set_timesteps(4)
    watch = Watch(BLOCK)
    first, second, *_ = sd.scheduler.timesteps
    sample(sd, [first, first - 3, second], watch)
    assert [c.step for c in watch.contexts] == [0, None, None]


def test_a_step_that_somebody_put_on_the_scheduler_is_heard_and_left_there(sd):
    own = sd.scheduler.step
    sd.scheduler.step = lambda *args, **kwargs: own(*args, **kwargs)
    theirs = sd.scheduler.step
    pixels(sd, steps=1)
    before = everything(sd)
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, steps=3)
    assert [c.step for c in watch.contexts] == [0, 1, 2]
    assert sd.scheduler.step is theirs
    assert everything(sd) == before


def test_one_that_calls_the_classes_is_heard_once(sd):
    sd.scheduler.step = lambda *args, **kwargs: type(sd.scheduler).step(sd.scheduler, *args, **kwargs)
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, steps=3)
    assert [c.step for c in watch.contexts] == [0, 1, 2]


@pytest.mark.parametrize("order", ["main first", "copy first"])
def test_schedulers_that_step_one_after_the_other_step_together(sd, order):
    """LTX-2 has a scheduler for the video and a copy of it for the sound."""
    watch = Watch(BLOCK)
    with torch.no_grad(), attach(sd, watch) as run, run.call(["a fox"]):
        embeds, _ = sd.encode_prompt("a fox", "cpu", 1, False)
        sd.scheduler.set_timesteps(4)
        beside = copy.deepcopy(sd.scheduler)
        latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for timestep in sd.scheduler.timesteps:
            noise = sd.unet(latent, timestep, encoder_hidden_states=embeds).sample
            schedulers = [sd.scheduler, beside] if order == "main first" else [beside, sd.scheduler]
            latent, _ = (s.step(noise, timestep, latent).prev_sample for s in schedulers)
    assert [c.step for c in watch.contexts] == [0, 1, 2, 3]
    assert [c.step for c in watch.ended] == [0, 1, 2, 3]


def test_ltx2_has_one_step_for_both_of_its_schedulers():
    family = families()["ltx2"]
    if not family.available:
        pytest.skip("LTX2Pipeline is not in this diffusers")
    watch = Watch("transformer.transformer_blocks.0")
    with attach(pipe := family.build(), watch):
        family.call(pipe, ["a fox"], guidance=True, steps=3)
    assert [c.step for c in watch.contexts] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [c.condition for c in watch.contexts[:3]] == [("uncond", "cond"), ("perturbed",), ("perturbed",)]
