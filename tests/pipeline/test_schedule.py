"""Which step it is: by the scheduler, for every kind of scheduler."""

from __future__ import annotations

import diffusers
import pytest
import torch

from sparsefeat.pipeline import attach
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_scheduler, tiny_sd, tiny_sdxl

BLOCK = "unet.up_blocks.1.attentions.1"


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.mark.parametrize(
    ("name", "n_steps"),  # PNDM itself needs two steps
    [(name, n) for name in ("ddim", "pndm", "euler", "heun") for n in (1, 2, 3, 7) if (name, n) != ("pndm", 1)],
)
def test_steps_are_those_asked_for_with_every_scheduler(sd, name, n_steps):
    sd.scheduler = tiny_scheduler(name)
    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        pixels(sd, steps=n_steps)
    runs = {"ddim": n_steps, "euler": n_steps, "pndm": n_steps + 1, "heun": 2 * n_steps - 1}[name]
    steps = [context.step for context in watch.contexts]
    assert len(steps) == runs, "how often the model runs is the scheduler's business"
    assert steps == sorted(steps)
    assert set(steps) == set(range(n_steps))
    assert {context.n_steps for context in watch.contexts} == {n_steps}
    assert [c.fraction for c in watch.contexts] == pytest.approx([s / n_steps for s in steps])
    assert [context.step for context in watch.ended] == list(range(n_steps)), "every step ends once"
    assert run.calls[0].call.n_steps == n_steps
    assert len(run.calls[0].call.timesteps) == runs
    assert [c.timestep for c in watch.contexts] == list(run.calls[0].call.timesteps)


def test_a_second_order_scheduler_runs_the_model_twice_in_a_step(sd):
    sd.scheduler = tiny_scheduler("heun")
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, steps=3)
    assert [context.step for context in watch.contexts] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
    ],
)
def test_other_schedulers_count_as_well(sd, name):
    sd.scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, steps=4)
    assert sorted({context.step for context in watch.contexts}) == [0, 1, 2, 3]
    assert [context.step for context in watch.ended] == [0, 1, 2, 3]
    assert {context.n_steps for context in watch.contexts} == {4}


def test_the_callers_own_timesteps_are_counted(sd):
    sd.scheduler = tiny_scheduler("euler")
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, timesteps=[900, 500, 100])
    assert [(c.step, c.n_steps, c.timestep) for c in watch.contexts] == [(0, 3, 900), (1, 3, 500), (2, 3, 100)]


def test_a_run_that_stops_early_keeps_the_fractions_of_the_whole_schedule():
    pipe = tiny_sdxl()
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        pixels(pipe, steps=10, denoising_end=0.4, output_type="latent")
    assert [c.step for c in watch.contexts] == [0, 1, 2, 3]
    assert [c.fraction for c in watch.contexts] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert {c.n_steps for c in watch.contexts} == {4}


def test_an_interrupted_pipeline_ends_its_call_with_the_steps_it_did(sd):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = True
        return {}

    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        pixels(sd, steps=5, callback_on_step_end=stop)
    assert [context.step for context in watch.ended] == [0]
    assert run[watch] == 1


def test_steps_are_counted_without_any_hookpoint_in_the_denoiser(sd):
    watch = Watch("text_encoder.encoder.layers.0")
    with attach(sd, watch):
        pixels(sd, steps=3)
    assert [context.step for context in watch.ended] == [0, 1, 2]


def test_the_timestep_waits_for_the_device_only_when_it_is_read(sd, monkeypatch):
    reads = []
    original = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda self: reads.append(1) or original(self))
    sd.scheduler = tiny_scheduler("ddim")
    images = pixels(sd)
    without = len(reads)
    reads.clear()
    watch = Watch(BLOCK)
    with attach(sd, watch):
        assert (pixels(sd) == images).all()
    assert len(reads) == without
    assert watch.contexts[0].timestep > watch.contexts[1].timestep
    assert len(reads) == without + 2
