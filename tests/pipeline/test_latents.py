"""Instruments that answer: other arguments for a component, and other latents for the scheduler to step from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.pipeline import Instrument, attach
from tests.pipeline.instruments import Watch
from tests.tiny import pixels, tiny_sd


class Shift(Instrument):
    """Adds `shift` to the latents at one evaluation of the denoiser: to what it is given, and to what is stepped from."""

    def __init__(self, shift, at):
        self.shift, self.at, self.seen = shift, at, []

    def components(self, pipe):
        self.scheduler = pipe.scheduler
        return ("unet",)

    def at_component(self, name, arguments, context):
        if context.evaluation != self.at:
            return None
        one = torch.ones(1, dtype=torch.float64)
        if hasattr(self.scheduler, "scale_model_input"):
            one = self.scheduler.scale_model_input(one, arguments["timestep"])
        return {"sample": arguments["sample"] + self.shift * float(one)}

    def before_step(self, sample, context):
        self.seen.append((context.step, context.evaluation, sample.shape))
        return sample + self.shift if context.evaluation == self.at else None


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "euler", "heun"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_latents_moved_within_a_step_are_those_a_callback_moved_before_it(scheduler, guidance):
    pipe = tiny_sd(scheduler)
    shift = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    untouched = pixels(pipe, steps=3, guidance_scale=guidance, output_type="latent")

    def moved(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] + shift} if i == 1 else {}

    wanted = pixels(pipe, steps=3, guidance_scale=guidance, output_type="latent", callback_on_step_end=moved)
    instrument = Shift(shift, at=2)
    with attach(pipe, instrument):
        found = pixels(pipe, steps=3, guidance_scale=guidance, output_type="latent")
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, untouched, atol=1e-2)
    assert [evaluation for _, evaluation, _ in instrument.seen] == list(range(len(pipe.scheduler.timesteps)))
    assert {tuple(shape) for _, _, shape in instrument.seen} == {(1, 4, 16, 16)}


def test_an_instrument_that_answers_nothing_changes_no_bit():
    pipe = tiny_sd()
    before = pixels(pipe)
    with attach(pipe, Shift(torch.zeros(1), at=99)):
        assert np.array_equal(pixels(pipe), before)


class Answer(Instrument):
    def __init__(self, component=None, step=None):
        self.component, self.step = component, step

    def components(self, pipe):
        return ("unet",)

    def at_component(self, name, arguments, context):
        return self.component

    def before_step(self, sample, context):
        return self.step


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            {"component": {"sample": torch.zeros(3)}},
            r"Answer.at_component answered a tensor \[3\] in the place of 'sample'",
        ),
        ({"component": {"smaple": torch.zeros(3)}}, r"in the place of 'smaple', which is NoneType; answer a tensor of"),
        (
            {"step": torch.zeros(2, 4, 16, 16)},
            r"Answer.before_step answered a tensor \[2, 4, 16, 16\] in the place of the",
        ),
        (
            {"step": 3},
            r"Answer.before_step answered int in the place of the latents, which is a tensor \[1, 4, 16, 16\]",
        ),
    ],
)
def test_answers_of_another_shape_are_refused(answer, said):
    pipe = tiny_sd()
    with attach(pipe, Answer(**answer)), pytest.raises(ValueError, match=said):
        pixels(pipe)


def test_a_later_instrument_sees_what_an_earlier_one_answered():
    pipe = tiny_sd()
    seen = []

    class See(Instrument):
        def components(self, pipe):
            return ("unet",)

        def at_component(self, name, arguments, context):
            seen.append(float(arguments["sample"].abs().max()))

        def before_step(self, sample, context):
            seen.append(float(sample.abs().max()))

    with attach(pipe, Answer({"sample": torch.zeros(2, 4, 16, 16)}, torch.ones(1, 4, 16, 16)), See()):
        pixels(pipe, steps=1)
    assert seen == [0.0, 1.0]


def test_rows_are_told_apart_under_inference_mode_too():
    pipe = tiny_sd()
    watch = Watch("unet.mid_block.attentions.0")
    with attach(pipe, watch), torch.inference_mode():
        pixels(pipe, "a fox", guidance_scale=5.0)
    assert [context.condition for context in watch.contexts] == [("uncond", "cond")] * 2
