"""What a context says: grid, rows, conditions, images, prompts. Steps are in test_schedule.py."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPAGPipeline,
)

from sparsefeat.pipeline import Context, Delta, UnknownConditionError, attach
from tests.pipeline.instruments import Edit, Watch, push
from tests.tiny import pixels, tiny_scheduler, tiny_sd, tiny_sdxl

BLOCK = "unet.up_blocks.1.attentions.1"
TEXT = "text_encoder.encoder.layers.0"


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def sdxl():
    return tiny_sdxl()


# Grids. The latent of 64 x 64 pixels is 16 x 16, halved at each level.


@pytest.mark.parametrize(
    ("width", "height", "levels"),
    [
        (64, 64, [(16, 16), (8, 8), (4, 4)]),
        (48, 80, [(20, 12), (10, 6), (5, 3)]),
        (128, 32, [(8, 32), (4, 16), (2, 8)]),
        (72, 56, [(14, 18), (7, 9), (4, 5)]),  # odd sides are halved upwards
    ],
)
def test_the_grid_is_right_at_every_level_and_size(sd, width, height, levels):
    blocks = ("down_blocks.0.attentions.0", "down_blocks.1.attentions.0", "mid_block.attentions.0")
    outputs = Watch(*(f"unet.{block}" for block in blocks))
    sequences = Watch(*(f"unet.{block}.transformer_blocks.0" for block in blocks))
    inner = Watch(*(f"unet.{block}.transformer_blocks.0.attn2:input" for block in blocks))
    with attach(sd, outputs, sequences, inner):
        pixels(sd, width=width, height=height, steps=1)
    for watch in (outputs, sequences, inner):
        assert [context.grid for context in watch.contexts] == levels
        for context, rows in zip(watch.contexts, watch.rows, strict=True):
            height_, width_ = context.grid
            assert context.positions == height_ * width_
            assert rows.shape[0] == context.batch * context.positions


def test_rows_run_over_the_grid_in_row_major_order(sd):
    outputs = []

    def corner(activations, context):
        height, width = context.grid
        rows = torch.zeros_like(activations.rows).view(context.batch, height, width, -1)
        rows[1, 2, 5] = 100.0
        return Delta(rows.flatten(0, 2))

    block = sd.unet.up_blocks[1].attentions[1]
    with attach(sd, Edit(corner, BLOCK)):
        handle = block.register_forward_hook(lambda m, a, output: outputs.append(output[0]))
        pixels(sd, width=48, height=80, steps=1)
        handle.remove()
    big = (outputs[0] > 50).all(1).nonzero()
    assert big.tolist() == [[1, 2, 5]]


# Conditions and images


def test_under_guidance_the_unconditional_chunk_comes_first(sd):
    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        pixels(sd)
    assert watch.contexts[0].condition == ("uncond", "cond")
    assert watch.contexts[0].prompt_index == (0, 0)
    assert run.calls[0].call.guidance is True


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_without_guidance_every_entry_is_conditional(sd, scale):
    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        pixels(sd, ["fox", "cat"], guidance_scale=scale)
    assert watch.contexts[0].condition == ("cond", "cond")
    assert watch.contexts[0].prompt_index == (0, 1)
    assert run.calls[0].call.guidance is False


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_several_prompts_and_images_a_prompt_are_told_apart(build, guidance):
    pipe = build()
    watch = Watch(BLOCK)
    with attach(pipe, watch) as run:
        images = pixels(pipe, ["fox", "cat", "a"], num_images_per_prompt=2, guidance_scale=guidance, steps=1)
    context, call = watch.contexts[0], run.calls[0].call
    chunks = 2 if guidance > 1 else 1
    assert context.batch == 6 * chunks
    assert context.condition == ("uncond",) * 6 * (chunks - 1) + ("cond",) * 6
    assert context.prompt_index == (0, 1, 2, 3, 4, 5) * chunks
    assert (call.prompts, call.images_per_prompt, call.n_images) == (["fox", "cat", "a"], 2, 6)
    assert len(images) == call.n_images
    assert context.prompts == call.prompts


def test_an_edit_of_one_image_changes_that_image_and_no_other(sd):
    # The index of the output list, seen from the other side.
    def only(wanted):
        def rule(activations, context):
            entries = torch.tensor([image == wanted for image in context.prompt_index])
            return Delta(9.0 * entries.repeat_interleave(context.positions)[:, None] * torch.ones(32))

        return rule

    call = {"prompt": ["fox", "cat"], "num_images_per_prompt": 2, "output_type": "latent"}
    plain = pixels(sd, **call)
    for image in range(4):
        with attach(sd, Edit(only(image), BLOCK)):
            edited = pixels(sd, **call)
        changed = [not torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, edited, strict=True)]
        assert changed == [index == image for index in range(4)]


def test_an_edit_of_the_conditional_rows_works_through_the_guidance_alone(sd):
    def conditional(activations, context):
        return Delta(context.row_condition()[:, None] * torch.ones(32))

    def unconditional(activations, context):
        return Delta(context.row_condition("uncond")[:, None] * torch.ones(32))

    watch = Watch(f"{BLOCK}")
    for rule, chunk in ((conditional, 1), (unconditional, 0)):
        before = Watch(BLOCK)
        with attach(sd, before, Edit(rule, BLOCK), watch):
            pixels(sd, steps=1)
        changed = (watch.rows[0] != before.rows[0]).any(1).view(2, -1)
        assert changed[chunk].all()
        assert not changed[1 - chunk].any()


def test_embeddings_instead_of_prompts_count_as_prompts(sd):
    cond, uncond = sd.encode_prompt(["fox", "cat"], "cpu", 1, True)
    watch = Watch(BLOCK)
    with attach(sd, watch) as run:
        pixels(sd, None, prompt_embeds=cond, negative_prompt_embeds=uncond, num_images_per_prompt=2, steps=1)
    assert watch.contexts[0].prompt_index == (0, 1, 2, 3) * 2
    assert run.calls[0].call.prompts is None


def _components(pipe, *without):
    return {name: part for name, part in pipe.components.items() if name not in without}


def test_instruct_pix2pix_has_three_chunks_the_conditional_first():
    base = tiny_sd(in_channels=8)
    pipe = StableDiffusionInstructPix2PixPipeline(**_components(base), requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    watch, text = Watch(BLOCK), Watch(TEXT)
    with attach(pipe, watch, text):
        pixels(pipe, ["fox", "cat"], image=torch.rand(2, 3, 64, 64), steps=1)
    assert watch.contexts[0].condition == ("cond", "cond", "image", "image", "uncond", "uncond")
    assert watch.contexts[0].prompt_index == (0, 1) * 3
    assert [c.condition for c in text.contexts] == [("cond", "cond"), ("uncond", "uncond")]
    with attach(pipe, watch):
        pixels(pipe, "fox", image=torch.rand(1, 3, 64, 64), guidance_scale=1.0, steps=1)
    assert watch.contexts[0].condition == ("cond",)


@pytest.mark.parametrize(
    ("guidance", "pag", "layout"),
    [
        (5.0, 3.0, ("uncond", "cond", "perturbed")),
        (1.0, 3.0, ("cond", "perturbed")),
        (5.0, 0.0, ("uncond", "cond")),
    ],
)
def test_perturbed_attention_guidance_names_its_own_chunk(guidance, pag, layout):
    pipe = StableDiffusionPAGPipeline(
        **_components(tiny_sd()), requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(BLOCK)
    with attach(pipe, watch):
        pixels(pipe, guidance_scale=guidance, pag_scale=pag, steps=1)
    assert watch.contexts[0].condition == layout


def test_a_layout_that_is_not_known_is_called_unknown_and_refused_to_who_needs_it(sd):
    def loop(*instruments, **layout):
        with attach(sd, *instruments, **layout) as run, run.call(["fox", "cat"]):
            sd.unet(torch.zeros(3, 4, 16, 16), 1, torch.zeros(3, 16, 32))

    watch, both = Watch(BLOCK), Watch(BLOCK)
    loop(watch)
    assert watch.contexts[0].condition == ("unknown",) * 3
    with pytest.raises(UnknownConditionError, match=r"3 batch entries at .*layout="):
        watch.contexts[0].row_condition()
    for condition in ("cond", "uncond", "cond+uncond-"):
        needs = Watch(BLOCK)
        needs.condition = condition
        with pytest.raises(UnknownConditionError, match=r"3 batch entries at .* Watch acts on some of them.*layout="):
            loop(needs)
    both.condition = "both"
    loop(both)
    assert len(both.contexts) == 1


def test_a_stated_layout_is_believed_where_nothing_contradicts_it(sd):
    def loop(layout, *batches):
        watch = Watch(BLOCK)
        with attach(sd, watch, layout=layout) as run, run.call(["fox", "cat"]):
            for batch in batches:
                sd.unet(torch.zeros(batch, 4, 16, 16), 1, torch.zeros(batch, 16, 32))
        return [c.condition for c in watch.contexts]

    assert loop(("cond", "perturbed", "uncond"), 6) == [("cond",) * 2 + ("perturbed",) * 2 + ("uncond",) * 2]
    assert loop([("uncond",), ("cond",)], 2, 2) == [("uncond",) * 2, ("cond",) * 2]
    for wrong in ("cond", ("cond", "no"), [], [()]):
        with pytest.raises(ValueError, match="layout="):
            attach(sd, Watch(BLOCK), layout=wrong)


def test_a_controlnet_is_a_denoiser_beside_the_unet():
    base = tiny_sd()
    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16))
    parts = _components(base)
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    watch, control = Watch(BLOCK), Watch("controlnet.mid_block.attentions.0")
    with attach(pipe, watch, control):
        pixels(pipe, image=torch.rand(1, 3, 64, 64), steps=2)
        assert [c.step for c in control.contexts] == [c.step for c in watch.contexts] == [0, 1]
        assert control.contexts[0].condition == ("uncond", "cond")
        pixels(pipe, image=torch.rand(1, 3, 64, 64), steps=2, guess_mode=True)
    assert control.contexts[0].condition == ("cond",)
    assert watch.contexts[0].condition == ("uncond", "cond")


def test_the_vae_can_be_read_too_outside_the_steps(sd):
    watch = Watch("vae.decoder")
    with attach(sd, watch):
        pixels(sd, ["fox", "cat"])
    (context,) = watch.contexts
    assert (context.step, context.grid, context.condition) == (None, (64, 64), ("cond", "cond"))
    assert context.prompt_index == (0, 1)


# Text encoders


def test_a_text_encoder_has_no_step_and_no_grid_and_its_condition_is_by_order(sd):
    watch = Watch(TEXT)
    with attach(sd, watch):
        pixels(sd, ["fox", "cat"], num_images_per_prompt=3, steps=1)
    first, second = watch.contexts
    assert (first.step, first.n_steps, first.fraction, first.grid, first.timestep) == (None,) * 5
    assert (first.condition, second.condition) == (("cond", "cond"), ("uncond", "uncond"))
    assert first.prompt_index == second.prompt_index == (0, 3)
    assert first.stream == "text"
    assert first.positions == 16


@pytest.mark.parametrize("negative", [None, "cat"])
def test_both_text_encoders_of_sdxl_have_their_own_order(sdxl, negative):
    watches = [Watch(TEXT), Watch("text_encoder_2.encoder.layers.0")]
    with attach(sdxl, *watches):
        pixels(sdxl, ["fox", "a"], negative_prompt=negative and [negative] * 2, steps=1)
    for watch in watches:  # without a negative prompt SDXL takes zeros instead
        expected = [("cond", "cond")] + ([("uncond", "uncond")] if negative else [])
        assert [context.condition for context in watch.contexts] == expected


def test_with_the_prompt_as_embeddings_the_encoder_only_runs_for_the_negative_prompt(sd):
    cond, _ = sd.encode_prompt("fox", "cpu", 1, False)
    watch = Watch(TEXT)
    with attach(sd, watch):
        pixels(sd, None, prompt_embeds=cond, negative_prompt="cat", steps=1)
    assert [context.condition for context in watch.contexts] == [("uncond",)]


def test_an_edit_of_the_conditional_text_leaves_the_negative_prompt_alone(sd):
    def rule(activations, context):
        return Delta(context.row_condition()[:, None] * torch.ones(32))

    before, after = Watch(TEXT), Watch(TEXT)
    with attach(sd, before, Edit(rule, TEXT), after):
        pixels(sd, steps=1)
    assert torch.equal(after.rows[0], before.rows[0] + 1)
    assert torch.equal(after.rows[1], before.rows[1])
    with attach(sd, Edit(push(), TEXT)):
        pixels(sd, steps=1)


# The context by itself


def test_row_tensors_follow_the_batch_entries():
    context = Context(condition=("uncond", "cond"), prompt_index=(0, 0), batch=2, positions=3)
    assert context.row_condition().tolist() == [False] * 3 + [True] * 3
    assert context.row_condition("uncond").tolist() == [True] * 3 + [False] * 3
    assert context.row_batch().tolist() == [0, 0, 0, 1, 1, 1]


def test_a_context_cannot_be_written_to():
    with pytest.raises(AttributeError):
        Context().step = 3


def test_image_to_image_is_followed_from_where_it_starts():
    base = tiny_sd()
    pipe = StableDiffusionImg2ImgPipeline(**_components(base), requires_safety_checker=False)
    pipe.scheduler = tiny_scheduler("euler")
    pipe.set_progress_bar_config(disable=True)
    watch = Watch(BLOCK)
    with attach(pipe, watch) as run:
        pixels(pipe, image=torch.rand(1, 3, 64, 64), strength=0.6, steps=10)
    assert [c.step for c in watch.contexts] == [0, 1, 2, 3, 4, 5]
    assert watch.contexts[0].n_steps == run.calls[0].call.n_steps == 6
    assert [c.fraction for c in watch.contexts] == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
