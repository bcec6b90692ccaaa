"""What edits do, and what watching does not: neutral ones give the same bits, others reach the image, in order."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.pipeline import (
    Delta,
    Hookpoint,
    Instrument,
    Replace,
    attach,
)
from tests.pipeline.instruments import CountingSAE, Edit, Encode, Watch, push, same, zero
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


# Edits that are refused


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
