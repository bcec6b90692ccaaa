"""Which step it is: by the scheduler, for every kind of scheduler."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from diffusers import StableDiffusionPipeline

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Watch
from tests.pipeline.knowing.loops import build
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


def test_each_runge_kutta_step_of_pndm_is_four_of_the_schedulers(sd):
    sd.scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    watch = Watch(BLOCK)
    with attach(sd, watch):
        pixels(sd, steps=6)
    assert [context.step for context in watch.contexts] == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 5]
    assert [context.step for context in watch.ended] == list(range(6))
    assert [c.fraction for c in watch.contexts] == pytest.approx([c.step / 6 for c in watch.contexts])
    assert max(c.timestep for c in watch.contexts if c.step >= 3) < 500


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


# Where a loop begins, on other pipelines and with schedulers whose timesteps repeat


@pytest.mark.parametrize("strength", [0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize(
    "scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler"]
)
def test_inpainting_begins_where_its_strength_says_with_timesteps_that_repeat(scheduler, strength):
    steps = 20
    options = {"use_karras_sigmas": True} if scheduler.startswith("DPM") else {}
    parts = {n: p for n, p in tiny_sd().components.items() if n not in ("safety_checker", "feature_extractor")}
    parts["scheduler"] = getattr(diffusers, scheduler)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options
    )
    pipe = diffusers.StableDiffusionInpaintPipeline(
        **{**parts, "image_encoder": None}, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(BLOCK)
    image, mask = torch.rand(1, 3, 64, 64), torch.ones(1, 1, 64, 64)
    with attach(pipe, watch) as run:
        pixels(pipe, image=image, mask_image=mask, strength=strength, steps=steps, height=64, width=64)
    first = steps - min(int(steps * strength), steps)
    assert watch.contexts[0].fraction == pytest.approx(first / steps)
    assert watch.contexts[-1].fraction == pytest.approx((steps - 1) / steps)
    assert [c.timestep for c in watch.contexts] == list(run.calls[0].call.timesteps)
    assert [c.step for c in watch.ended] == list(range(steps - first))


class Partial(StableDiffusionPipeline):
    """Takes the end of the schedule, in a way that nothing but the first timestep says."""

    @torch.no_grad()
    def __call__(self, first: int, steps: int = 6, again: bool = False) -> None:
        self.scheduler.set_timesteps(steps)
        for _ in range(2 if again else 1):
            for t in self.scheduler.timesteps[first:]:
                noise = self.unet(torch.zeros(1, 4, 16, 16), t, torch.zeros(1, 16, 32)).sample
                self.scheduler.step(noise, t, noise)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_a_loop_over_the_end_of_a_schedule_begins_at_its_first_timestep(first):
    pipe = build(Partial)
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        pipe(first)
    n = 6 - first
    assert [(c.step, c.n_steps) for c in watch.contexts] == [(step, n) for step in range(n)]
    assert [c.fraction for c in watch.contexts] == pytest.approx([(first + step) / 6 for step in range(n)])


def test_a_loop_that_runs_again_without_setting_the_scheduler_is_another_loop():
    pipe = build(Partial)
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        pipe(3, again=True)
    assert [(c.loop, c.step, c.fraction) for c in watch.contexts] == [
        (loop, step, pytest.approx((3 + step) / 6)) for loop in (0, 1) for step in range(3)
    ]
    assert [c.step for c in watch.ended] == [0, 1, 2, 0, 1, 2]


# Several schedulers in one call


class Pair(StableDiffusionPipeline):
    """A small model and a large one after it, each with a scheduler of its own, both set beforehand."""

    @property
    def components(self) -> dict:
        names = ("unet", "scheduler", "text_encoder", "tokenizer", "vae")
        return {**{name: getattr(self, name) for name in names}, "small": self.small}

    @torch.no_grad()
    def __call__(self, small: int, large: int, late: bool = False) -> None:
        self.small_scheduler.set_timesteps(small)
        if not late:
            self.scheduler.set_timesteps(large)
        for model, scheduler in ((self.small, self.small_scheduler), (self.unet, self.scheduler)):
            if late and model is self.unet:
                scheduler.set_timesteps(large)
            for t in scheduler.timesteps:
                noise = model(torch.zeros(1, 4, 16, 16), t, torch.zeros(1, 16, 32)).sample
                scheduler.step(noise, t, noise)


@pytest.mark.parametrize("late", [True, False])
def test_each_model_has_the_steps_of_its_own_scheduler(late):
    pipe = build(Pair)
    other = tiny_sd(seed=4)
    pipe.small, pipe.small_scheduler = other.unet, tiny_scheduler("euler")
    small, large = Watch("small.mid_block"), Watch("unet.mid_block")
    with attach(pipe, small, large) as run:
        pipe(2, 5, late)
    assert [(c.step, c.n_steps, c.fraction) for c in small.contexts] == [(s, 2, s / 2) for s in range(2)]
    assert [(c.step, c.n_steps, c.fraction) for c in large.contexts] == [(s, 5, s / 5) for s in range(5)]
    assert run.calls[0].call.n_steps == 5


class Copies(StableDiffusionPipeline):
    """Each part of the latent has a copy of the scheduler; all of them step after each run of the model."""

    @torch.no_grad()
    def __call__(self, parts: int, steps: int = 4) -> list:
        self.scheduler.set_timesteps(steps)
        copies = [copy.deepcopy(self.scheduler) for _ in range(parts)]
        latents = [torch.full((1, 4, 16, 16), float(i)) for i in range(parts)]
        for t in self.scheduler.timesteps:
            noise = self.unet(sum(latents), t, torch.zeros(1, 16, 32)).sample
            latents = [c.step(noise, t, part).prev_sample for c, part in zip(copies, latents, strict=True)]
        return latents


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("place", [BLOCK, "text_encoder"])
def test_copies_of_a_scheduler_made_in_the_call_are_counted_together_and_step_as_they_would(parts, place):
    pipe = build(Copies)
    alone = pipe(parts)
    watch = Watch(place) if place == BLOCK else Watch()
    with attach(pipe, watch):
        got = pipe(parts)
    assert all(torch.equal(a, b) for a, b in zip(got, alone, strict=True))
    assert [c.step for c in watch.ended] == [0, 1, 2, 3]
    if place == BLOCK:
        assert [(c.step, c.n_steps) for c in watch.contexts] == [(s, 4) for s in range(4)]
    assert "step" not in vars(pipe.scheduler)


def test_a_timestep_for_every_token_is_the_schedulers():
    family = families()["wan"]
    if not family.available:
        pytest.skip("Wan is not in this diffusers")
    pipe = family.build()
    if "expand_timesteps" not in pipe.config:
        pytest.skip("this diffusers gives Wan one timestep for all tokens")
    pipe.register_to_config(expand_timesteps=True)
    given = []
    pipe.transformer.register_forward_pre_hook(lambda m, a, k: given.append(k["timestep"]), with_kwargs=True)
    watch = Watch("transformer.blocks.0")
    with attach(pipe, watch):
        family.call(pipe, ["a fox"], guidance=False, steps=3)
    assert given[0].ndim == 2
    assert [c.timestep for c in watch.contexts] == pytest.approx([float(t) for t in pipe.scheduler.timesteps])
