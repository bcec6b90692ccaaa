"""The promises of `attach` about sessions, recordings and errors. Edits are in test_edits.py, restoring the pipeline in
test_wiring.py.
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch

from sparsefeat.pipeline import (
    HookpointNotReachedError,
    Instrument,
    UnknownHookpointError,
    attach,
    detach,
)
from sparsefeat.pipeline.session import Session
from tests import tiny
from tests.pipeline.instruments import CountingSAE, Edit, Encode, Watch, push
from tests.tiny import pixels, tiny_sd, tiny_sdxl

BLOCK = "unet.up_blocks.1.attentions.1"


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


# Recordings


def test_the_session_gives_the_last_recording_and_keeps_those_of_earlier_calls(sd):
    watch, other = Watch(BLOCK), Watch("unet.mid_block")
    with attach(sd, watch, other) as run:
        pixels(sd, steps=1)
        pixels(sd, "cat", steps=3)
    assert run[watch] == 3
    assert [call[watch] for call in run.calls] == [1, 3]
    assert [call[other] for call in run.calls] == [1, 3]
    assert [call.call.prompts for call in run.calls] == [["a fox"], ["cat"]]


def test_asking_for_what_was_not_recorded_says_why(sd):
    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        with pytest.raises(KeyError, match="no call of the pipeline has completed"):
            run[watch]
        pixels(sd, steps=1)
    with pytest.raises(KeyError, match="was not attached in this session"):
        run[Watch(BLOCK)]


def test_the_life_of_an_instrument_is_in_the_promised_order(sd):
    log = []

    class Life(Watch):
        def prepare(self, pipe):
            log.append("prepare")

        def begin_call(self, call):
            log.append("begin_call")
            super().begin_call(call)

        def at_hookpoint(self, activations, context):
            log.append(f"at {context.step}")

        def end_step(self, context):
            log.append(f"end_step {context.step}")

        def end_call(self, call):
            log.append(f"end_call {call.n_steps}")

    life = Life(BLOCK)
    log.clear()
    with attach(sd, life):
        assert log == ["prepare"]
        pixels(sd, steps=2)
    assert log[1:] == ["begin_call", "at 0", "end_step 0", "at 1", "end_step 1", "end_call 2"]


def test_the_pipeline_may_be_called_in_prepare_and_its_modules_in_every_method(sd):
    class Curious(Watch):
        def prepare(self, pipe):
            self.prepared = pixels(pipe, steps=1)
            with attach(pipe, Watch(BLOCK)):
                pixels(pipe, steps=1)

        def at_hookpoint(self, activations, context):
            super().at_hookpoint(activations, context)
            embeds, _ = sd.encode_prompt("cat", "cpu", 1, False)
            sd.unet(torch.zeros(1, 4, 16, 16), 1, embeds)
            pixels(sd, steps=1)

    curious, beside = Curious(BLOCK), Watch(BLOCK, "text_encoder.encoder.layers.0")
    with attach(sd, curious, beside) as run:
        pixels(sd, steps=2)
    assert run[curious] == 2
    assert run[beside] == 2 + 2, "modules run by an instrument were hooked"


# Names and widths, before anything runs


def test_a_wrong_name_is_refused_by_attach(sd):
    with pytest.raises(UnknownHookpointError, match=r"unet\.up_blocks\.1\.attentions\.1"):
        attach(sd, Watch("unet.up_blocks.1.attention.1"))
    assert "_sparsefeat_wiring" not in vars(type(sd))


def test_an_sae_of_the_wrong_width_is_refused_before_anything_runs(sd):
    with pytest.raises(ValueError, match=r"Encode needs activations of width 48, but .*attentions.1 is 32 wide"):
        attach(sd, Encode(CountingSAE(48), BLOCK))
    assert "_sparsefeat_wiring" not in vars(type(sd))


def test_attach_refuses_what_is_no_instrument(sd):
    with pytest.raises(TypeError, match=r"instruments\[0\] is str, not an Instrument"):
        attach(sd, BLOCK)
    with pytest.raises(ValueError, match="no instrument"):
        attach(sd)
    watch = Watch(BLOCK)
    with pytest.raises(ValueError, match=r"instruments\[1\] \(Watch\) was given twice"):
        attach(sd, watch, watch)


# Hookpoints that a call never reaches


def test_a_hookpoint_never_reached_is_an_error_after_the_call_with_its_result(sd):
    embeds, negative = sd.encode_prompt("a fox", "cpu", 1, True)
    images = pixels(sd)
    text, also, image = Watch("text_encoder.encoder.layers.1"), Watch("text_encoder.encoder.layers.1"), Watch(BLOCK)
    with attach(sd, text, also, image) as run:
        with pytest.raises(HookpointNotReachedError) as error:
            pixels(sd, None, prompt_embeds=embeds, negative_prompt_embeds=negative)
        assert np.array_equal(error.value.result.images, images)
        assert error.value.missing == ("text_encoder.encoder.layers.1",)
        assert "prompt_embeds" in str(error.value)
        assert "session of its own" in str(error.value), "the remedy is missing"
        assert run[image] == 2, "what was reached is recorded all the same"
        for unreached in (text, also):
            with pytest.raises(KeyError, match="never reached"):
                run[unreached]
        pixels(sd)
        assert run[text] == 2


def test_no_call_at_all_is_no_error(sd):
    with attach(sd, Watch("text_encoder.encoder.layers.1")):
        pass


def test_nothing_is_raised_over_another_exception(sd):
    def interrupt(pipe, step, timestep, tensors):
        raise RuntimeError("from the callback")

    embeds, negative = sd.encode_prompt("a fox", "cpu", 1, True)
    with (
        attach(sd, Watch("text_encoder.encoder.layers.1")) as run,
        pytest.raises(RuntimeError, match="from the callback"),
    ):
        pixels(sd, None, prompt_embeds=embeds, negative_prompt_embeds=negative, callback_on_step_end=interrupt)
    assert run.calls == []


def test_an_exception_inside_an_instrument_propagates_and_the_session_goes_on(sd):
    class Fails(Watch):
        fail = True

        def at_hookpoint(self, activations, context):
            super().at_hookpoint(activations, context)
            if self.fail and context.step == 1:
                raise ZeroDivisionError("inside the instrument")

    fails = Fails(BLOCK)
    images = pixels(sd)
    with attach(sd, fails) as run:
        with pytest.raises(ZeroDivisionError, match="inside the instrument"):
            pixels(sd)
        assert run.calls == []
        assert "step" not in vars(sd.scheduler)
        fails.fail = False
        assert np.array_equal(pixels(sd), images)
        assert run[fails] == 2


def test_wrong_arguments_of_the_call_give_the_pipelines_own_error_or_the_nearest_name(sd):
    with attach(sd, Watch(BLOCK)):
        with pytest.raises(TypeError, match="positional arguments"):
            sd(*range(50))
        with pytest.raises(ValueError, match="Provide either `prompt` or `prompt_embeds`"):
            sd()
        with pytest.raises(TypeError, match=r"promt= is no argument .* did you mean prompt\?"):
            sd(promt="a fox")
        with pytest.raises(ValueError, match="divisible by 8"):
            sd("a fox", height=13, width=64)


# Loops of one's own


def test_a_module_that_runs_outside_a_call_is_refused_with_the_remedy(sd):
    with attach(sd, Watch(BLOCK)), pytest.raises(RuntimeError, match=r"outside a call .*`with session\.call"):
        sd.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 16, 32))


def test_a_loop_of_ones_own_is_a_call_inside_session_call():
    pipe = tiny_sd("pndm")
    pixels(pipe, steps=2)  # leaves `num_timesteps` of another length behind
    image, text = Watch(BLOCK), Watch("text_encoder.encoder.layers.0")
    with attach(pipe, image, text) as run, torch.no_grad():
        with run.call(prompts=["fox", "cat"], guidance=True) as call:
            cond, uncond = pipe.encode_prompt(["fox", "cat"], "cpu", 1, True)
            pipe.scheduler.set_timesteps(4)
            latents = torch.randn(2, 4, 16, 16)
            for t in pipe.scheduler.timesteps:
                noise = pipe.unet(torch.cat([latents] * 2), t, torch.cat([uncond, cond])).sample
                latents = pipe.scheduler.step(noise.chunk(2)[1], t, latents).prev_sample
        assert run[image] == 5
        assert [c.step for c in image.contexts] == [0, 0, 1, 2, 3]
        assert image.contexts[0].condition == ("uncond", "uncond", "cond", "cond")
        assert [c.condition for c in text.contexts] == [("cond", "cond"), ("uncond", "uncond")]
        assert call.n_steps == 4
        with run.call("fox"):  # only a part of the pipeline: what did not run was not meant to
            pipe.encode_prompt("fox", "cpu", 1, False)
        assert (run[image], run[text]) == (0, 1)


# Threads


def test_a_second_thread_on_the_same_pipeline_is_refused_with_the_remedy(sd):
    errors = []

    def other(work):
        def run():
            try:
                work()
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with attach(sd, Watch(BLOCK)) as run:
        other(lambda: pixels(sd))
        other(lambda: attach(sd, Watch(BLOCK)))
        other(lambda: sd.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 16, 32)))
        assert len(errors) == 3
        assert all("another thread" in error and "pipeline of its own" in error for error in errors)
        assert run.calls == []
        pixels(sd)
        assert len(run.calls) == 1
    other(lambda: pixels(sd))
    assert len(errors) == 3, "after the session any thread may use the pipeline"


def test_a_call_within_a_call_is_refused(sd):
    def again(pipe, step, timestep, tensors):
        pixels(pipe)

    with attach(sd, Watch(BLOCK)), pytest.raises(RuntimeError, match="called again before its call had ended"):
        pixels(sd, callback_on_step_end=again)


def test_a_pipeline_that_is_attached_to_within_its_call_says_to_attach_first(sd):
    sessions = []

    def begin(pipe, step, timestep, tensors):
        sessions.append(attach(pipe, Watch(BLOCK)))
        return tensors

    with pytest.raises(
        RuntimeError, match=r"was in a call already when it was attached to .*; attach first and call then"
    ):
        pixels(sd, callback_on_step_end=begin)
    sessions[0].close()
    pixels(sd)


def test_a_with_block_of_a_closed_session_is_refused_as_nothing_would_be_recorded_in_it(sd):
    session = attach(sd, watch := Watch(BLOCK))
    with session:
        pixels(sd)
    with pytest.raises(RuntimeError, match="the session is closed; attach again"), session:
        pass
    session.close()
    assert isinstance(session, Session)
    assert len(session.calls) == 1
    assert session[watch] is not None


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_session_is_not_copied(sd, how):
    with (
        attach(sd, Watch(BLOCK)) as session,
        pytest.raises(TypeError, match=r"is of its pipeline and is not copied; copy"),
    ):
        how(session)
    with pytest.raises(TypeError, match=r"copy what it recorded, run\[instrument\]"):
        how(session)


def test_an_exit_stack_enters_a_session_and_closes_it(sd):
    plain = pixels(sd)
    with contextlib.ExitStack() as stack:
        run = stack.enter_context(attach(sd, watch := Watch(BLOCK)))
        pixels(sd)
        assert run[watch] > 0
    with pytest.raises(RuntimeError, match="closed; attach again"), contextlib.ExitStack() as stack:
        stack.enter_context(run)
    assert (pixels(sd) == plain).all()


def test_the_base_instrument_does_nothing(sd):
    images = pixels(sd)
    with attach(sd, nothing := Instrument()) as run:
        assert np.array_equal(pixels(sd), images)
        assert run[nothing] is None


def test_a_model_in_the_pipelines_place_is_refused(sd):
    with pytest.raises(TypeError, match=r"pipe is UNet2DConditionModel, one of a pipeline's models"):
        attach(sd.unet, Watch("unet.mid_block"))


def test_an_instrument_of_an_open_session_is_refused_in_a_second_one(sd):
    watch = Watch("unet.mid_block.attentions.0")
    with attach(sd, watch), pytest.raises(ValueError, match=r"this Watch is attached .* still open"):
        attach(sd, watch)
    with attach(sd, watch) as again:  # one after the other is fine
        assert again.instruments == (watch,)


# Sessions that nobody kept


def test_a_session_that_nobody_kept_acts_and_is_told_of_once_and_detach_ends_it(sd):
    plain = pixels(sd)
    attach(sd, Edit(push(), BLOCK))
    with pytest.warns(UserWarning, match=r"attach gave for Edit was not kept, .*sf\.detach\(pipe\) closes it") as told:
        acted = pixels(sd)
    assert [warning.filename for warning in told] == [tiny.__file__], (
        "the warning is of the line that calls the pipeline"
    )
    assert not np.array_equal(acted, plain), "what is attached acts at once"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(sd), acted)
    detach(sd)
    assert "_sparsefeat_wiring" not in vars(type(sd))
    assert np.array_equal(pixels(sd), plain)
    detach(sd)  # of nothing


def test_the_cell_that_attaches_is_run_again_and_both_act_which_is_told(sd):
    run = attach(sd, Watch(BLOCK))
    run = attach(sd, second := Watch(BLOCK))
    with pytest.warns(UserWarning, match="Watch was not kept"):
        pixels(sd)
    assert run[second] == 2
    detach(sd)
    assert repr(run) == "Session(Watch; 1 calls, closed)", "detach closes those that are kept too"
    with pytest.raises(RuntimeError, match="closed; attach again"), run:
        pass


def test_nothing_is_said_of_a_session_in_a_with_block_or_a_stack_or_that_is_held(sd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(sd, Watch(BLOCK)):
            pixels(sd, steps=1)
        with contextlib.ExitStack() as stack:
            stack.enter_context(attach(sd, Watch(BLOCK)))
            pixels(sd, steps=1)
        held = [attach(sd, Watch(BLOCK)), attach(sd, Watch(BLOCK)).__enter__()]
        pixels(sd, steps=1)
        for session in held:
            session.close()


def test_detach_takes_several_pipelines_and_refuses_what_is_none(sd, sdxl):
    attach((sd, sdxl), Watch("unet.mid_block"))
    detach((sd, sdxl))
    for pipe in (sd, sdxl):
        assert "_sparsefeat_wiring" not in vars(type(pipe))
    with pytest.raises(TypeError, match=r"pipe is UNet2DConditionModel, one of a pipeline's models"):
        detach(sd.unet)


def test_an_instrument_of_a_session_that_nobody_kept_is_attached_again_after_detach(sd):
    watch = Watch(BLOCK)
    attach(sd, watch)
    with pytest.raises(ValueError, match=r"still open, .*sparsefeat\.detach\(pipe\) closes all"):
        attach(sd, watch)
    detach(sd)
    with attach(sd, watch) as run:
        pixels(sd)
    assert run[watch] == 2
