"""The promises of `attach` about edits, recordings and errors. Restoring the pipeline is in test_wiring.py."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from sparsefeat.pipeline import (
    Delta,
    Hookpoint,
    HookpointNotReachedError,
    Instrument,
    Replace,
    UnknownHookpointError,
    attach,
)
from tests.pipeline.instruments import CountingSAE, Edit, Watch, push, same, zero
from tests.tiny import pixels, tiny_sd, tiny_sdxl

BLOCK = "unet.up_blocks.1.attentions.1"
EVERYWHERE = (
    "unet.down_blocks.1.attentions.0",
    "unet.mid_block.attentions.0:diff",
    "unet.mid_block.resnets.1:diff",
    "unet.up_blocks.1.attentions.1",
    "unet.up_blocks.1.attentions.1:input",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2:input",
    "unet.up_blocks.1.resnets.0",
    "text_encoder.encoder.layers.0",
    "text_encoder.encoder.layers.1:diff",
)


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


# Neutral edits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("rule", [zero, same])
def test_a_neutral_edit_gives_bit_identical_images_and_latents(build, dtype, rule):
    pipe = build(dtype=dtype)
    where = [h for h in EVERYWHERE if rule is zero or not h.endswith(":diff")]
    images, latents = pixels(pipe), pixels(pipe, output_type="latent")
    assert images.std() > 0
    with attach(pipe, Edit(rule, *where)):
        assert np.array_equal(pixels(pipe), images)
        assert torch.equal(pixels(pipe, output_type="latent"), latents)


def test_a_neutral_edit_keeps_the_memory_format_of_the_block():
    # Convolutions round differently in another memory format, so this is what bit-identity hangs on.
    pipe = tiny_sd()
    pipe.unet.to(memory_format=torch.channels_last)
    strides = {}

    def keep(name):
        return lambda module, args, output: strides.setdefault(name, []).append(output[0].stride())

    block = pipe.unet.up_blocks[1].attentions[1]
    images = pixels(pipe)
    for name, rule in (("zero", zero), ("same", same)):
        with attach(pipe, Edit(rule, BLOCK)):
            handle = block.register_forward_hook(keep(name))
            assert np.array_equal(pixels(pipe), images)
            handle.remove()
    handle = block.register_forward_hook(keep("plain"))
    pixels(pipe)
    handle.remove()
    assert strides["zero"] == strides["same"] == strides["plain"]


def test_watching_changes_nothing(sd):
    images = pixels(sd)
    with attach(sd, Watch(*EVERYWHERE)):
        assert np.array_equal(pixels(sd), images)


# Edits


@pytest.mark.parametrize("hookpoint", EVERYWHERE)
def test_an_edit_anywhere_reaches_the_image(sd, hookpoint):
    latents = pixels(sd, output_type="latent")
    with attach(sd, Edit(push(), hookpoint)):
        assert not torch.equal(pixels(sd, output_type="latent"), latents)
    assert torch.equal(pixels(sd, output_type="latent"), latents)


def test_a_delta_is_added_to_the_output_and_rounded_once():
    pipe = tiny_sd(dtype=torch.bfloat16)
    delta = torch.randn(2 * 64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = Watch(BLOCK)
    after = Watch(BLOCK)
    with attach(pipe, before, Edit(lambda a, c: Delta(delta), BLOCK), after):
        pixels(pipe, steps=1)
    assert before.rows[0].dtype == torch.bfloat16
    expected = (before.rows[0].float() + delta.float()).to(torch.bfloat16)
    assert torch.equal(after.rows[0], expected)
    twice = before.rows[0] + delta.to(torch.bfloat16)
    assert not torch.equal(after.rows[0], twice)


def test_at_a_diff_hookpoint_the_activations_are_output_minus_input_and_a_delta_goes_to_the_output(sd):
    here = "unet.mid_block.attentions.0"
    given, gives, diff = Watch(f"{here}:input"), Watch(here), Watch(f"{here}:diff")
    last, last_diff = Watch(here), Watch(f"{here}:diff")
    with attach(sd, given, gives, diff, Edit(push(), f"{here}:diff"), last, last_diff):
        pixels(sd, steps=1)
    torch.testing.assert_close(diff.rows[0], gives.rows[0] - given.rows[0], rtol=0, atol=0)
    direction = 3 * torch.linspace(-1, 1, 32)
    assert torch.equal(last.rows[0], gives.rows[0] + direction)
    assert torch.equal(last_diff.rows[0], last.rows[0] - given.rows[0])


def test_at_a_diff_hookpoint_a_replacement_is_put_on_the_input(sd):
    here = "unet.mid_block.attentions.0"
    given, last = Watch(f"{here}:input"), Watch(here)
    with attach(sd, given, Edit(lambda a, c: Replace(torch.full_like(a.rows, 0.5)), f"{here}:diff"), last):
        pixels(sd, steps=1)
    assert torch.equal(last.rows[0], given.rows[0] + 0.5)


def test_at_an_input_hookpoint_the_block_runs_on_the_edited_input(sd):
    inputs = []
    block = sd.unet.up_blocks[1].attentions[1]
    with attach(sd, Watch(BLOCK), Edit(lambda a, c: Replace(torch.zeros_like(a.rows)), f"{BLOCK}:input")):
        handle = block.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        pixels(sd, steps=1)
        handle.remove()
    assert inputs[0].abs().max() == 0


def test_instruments_run_in_the_order_given_each_on_what_the_one_before_left(sd):
    first, second, third = Watch(BLOCK), Watch(BLOCK), Watch(BLOCK)
    with attach(sd, first, Edit(push(1.0), BLOCK), second, Edit(push(2.0), BLOCK), third):
        pixels(sd, steps=1)
    direction = torch.linspace(-1, 1, 32)
    assert torch.equal(second.rows[0], first.rows[0] + direction)
    assert torch.equal(third.rows[0], second.rows[0] + 2 * direction)


def test_an_edit_of_the_last_layer_a_pipeline_reads_reaches_it_also_after_a_first_call():
    # transformers puts its own collecting hooks on the layers in the first call; an edit made after them would be lost.
    pipe = tiny_sdxl()
    for _ in range(2):
        latents = pixels(pipe, output_type="latent")
        for encoder in ("text_encoder", "text_encoder_2"):  # `hidden_states[-2]` of three layers is the second's output
            with attach(pipe, Edit(push(), f"{encoder}.encoder.layers.1")):
                assert not torch.equal(pixels(pipe, output_type="latent"), latents), encoder


# Shared encodes


class Encode(Watch):
    def __init__(self, sae, *hookpoints, rule=None):
        self.sae = sae
        self.rule = rule
        super().__init__(*hookpoints)

    def at_hookpoint(self, activations, context):
        super().at_hookpoint(activations, context)
        self.code = activations.code(self.sae)
        return self.rule(activations, context) if self.rule else None


def test_instruments_that_share_an_sae_share_one_encode_until_an_edit_comes_between(sd):
    sae = CountingSAE(32)
    readers = [Encode(sae, BLOCK), Encode(sae, BLOCK)]
    with attach(sd, *readers):
        pixels(sd, steps=3)
    assert sae.encodes == 3
    assert readers[0].code is readers[1].code

    sae = CountingSAE(32)
    after = Encode(sae, BLOCK)
    with attach(sd, Encode(sae, BLOCK), Encode(sae, BLOCK, rule=push()), after, Encode(sae, BLOCK)):
        pixels(sd, steps=1)
    assert sae.encodes == 2
    assert torch.equal(after.code, after.rows[0])


def test_different_saes_or_hookpoints_share_nothing(sd):
    one, two = CountingSAE(32), CountingSAE(32)
    with attach(sd, Encode(one, BLOCK), Encode(two, BLOCK), Encode(one, f"{BLOCK}:diff")):
        pixels(sd, steps=1)
    assert (one.encodes, two.encodes) == (2, 1)


def test_outside_its_window_an_instrument_is_not_asked_and_that_is_no_error(sd):
    class Early(Encode):
        def active(self, context):
            return context.fraction < 0.5

    class Never(Early):
        def active(self, context):
            return False

    early, never = Early(CountingSAE(32), BLOCK), Never(CountingSAE(32), BLOCK)
    with attach(sd, early, never):
        pixels(sd, steps=4)
    assert [c.step for c in early.contexts] == [0, 1]
    assert early.sae.encodes == 2
    assert never.sae.encodes == 0


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


def test_a_delta_of_the_wrong_shape_is_refused_with_the_shape_that_was_wanted(sd):
    for rows in (torch.zeros(7), torch.zeros(5, 32), torch.zeros(2, 64, 32)):
        with (
            attach(sd, Edit(lambda a, c, rows=rows: Delta(rows), BLOCK)),
            pytest.raises(ValueError, match=r"\[128, 32\] \[batch \* positions, d_model\]"),
        ):
            pixels(sd, steps=1)


def test_a_difference_between_widths_is_refused(sd):
    with pytest.raises(ValueError, match="has no difference"):
        attach(sd, Watch("unet.down_blocks.1.resnets.0:diff"))


def test_a_difference_between_shapes_is_refused_when_it_runs(sd):
    with attach(sd, Watch("unet.down_blocks.0:diff")), pytest.raises(ValueError, match="which have no difference"):
        pixels(sd, steps=1)


@pytest.mark.parametrize("answer", [torch.zeros(128, 32), 0.0, "delta"], ids=repr)
def test_an_answer_that_is_neither_delta_nor_replace_is_refused(sd, answer):
    with attach(sd, Edit(lambda a, c: answer, BLOCK)), pytest.raises(TypeError, match="answer None, Delta"):
        pixels(sd, steps=1)


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


def test_the_base_instrument_does_nothing(sd):
    images = pixels(sd)
    with attach(sd, nothing := Instrument()) as run:
        assert np.array_equal(pixels(sd), images)
        assert run[nothing] is None


def test_autocast_is_for_the_model_and_not_for_instruments():
    """Under autocast an instrument's products keep the precision of its tensors."""
    pipe = tiny_sd()
    seen = []

    class Product(Instrument):
        def hookpoints(self):
            return (Hookpoint.parse("unet.mid_block.attentions.0"),)

        def at_hookpoint(self, activations, context):
            a, b = torch.full((2, 64), 1 + 2**-12), torch.ones(64, 2)
            seen.append(bool((a @ b == 64 * (1 + 2**-12)).all()) and (a @ b).dtype == torch.float32)

    with torch.autocast("cpu", torch.bfloat16), attach(pipe, Product()):
        pipe("a fox", num_inference_steps=2, output_type="latent")
        assert (torch.ones(2, 64) @ torch.ones(64, 2)).dtype == torch.bfloat16  # still on outside
    assert seen
    assert all(seen)


def test_a_model_in_the_pipelines_place_is_refused(sd):
    with pytest.raises(TypeError, match=r"pipe is UNet2DConditionModel, one of a pipeline's models"):
        attach(sd.unet, Watch("unet.mid_block"))


def test_an_instrument_of_an_open_session_is_refused_in_a_second_one(sd):
    watch = Watch("unet.mid_block.attentions.0")
    with attach(sd, watch), pytest.raises(ValueError, match=r"this Watch is attached .* still open"):
        attach(sd, watch)
    with attach(sd, watch) as again:  # one after the other is fine
        assert again.instruments == (watch,)
