"""FLUX.1: two passes told apart, embedded guidance that is none, reference images, and single blocks of either kind."""

from __future__ import annotations

import diffusers
import pytest
import torch
from torch import nn

from sparsefeat.pipeline import Delta, Hookpoint, attach
from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.flux import Flux, told_by_ids
from sparsefeat.pipeline.families.transformer import Side
from tests.families.flux import TEXT_TOKENS, WIDTH, build, call
from tests.pipeline.families.test_transformer import at
from tests.pipeline.instruments import Edit, Watch, zero

DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.1"


@pytest.fixture(scope="module")
def pipe():
    return build()


def contexts(pipe, **arguments):
    """(step, conditions, images) of each run of the denoiser."""
    watch = Watch(DOUBLE)
    with attach(pipe, watch) as run:
        call(pipe, **{"prompts": ["red fox"], "guidance": False, **arguments})
    return [(c.step, c.condition, c.prompt_index) for c in watch.contexts], run.calls[0].call


def test_true_guidance_runs_the_model_twice_a_step_on_the_same_images(pipe):
    seen, made = contexts(pipe, guidance=True, prompts=["red fox", "a cat"], images_per_prompt=2)
    images = (0, 1, 2, 3)
    assert seen == [(step, (name,) * 4, images) for step in (0, 1) for name in ("cond", "uncond")]
    assert made.guidance is True
    assert made.n_images == 4


def test_the_two_passes_are_those_that_the_pipeline_itself_names(pipe):
    # Newer pipelines tell their caches which pass it is. sparsefeat counts runs, as older ones do not.
    if not hasattr(pipe.transformer, "cache_context"):
        pytest.skip("this diffusers has no cache_context")
    named, cache_context = [], pipe.transformer.cache_context

    def spy(name, *args, **kwargs):
        named.append(name)
        return cache_context(name, *args, **kwargs)

    pipe.transformer.cache_context = spy
    try:
        seen, _ = contexts(pipe, guidance=True)
    finally:
        del pipe.transformer.cache_context
    if named:
        assert [condition for _, (condition,), _ in seen] == named


@pytest.mark.parametrize("embedded", [True, False])
def test_guidance_that_is_a_number_for_the_model_is_no_second_pass(embedded):
    pipe = build(embedded=embedded)
    seen, made = contexts(pipe, guidance_scale=7.0)
    assert seen == [(0, ("cond",), (0,)), (1, ("cond",), (0,))]
    assert made.guidance is False
    # Without a negative prompt the pipeline does no second pass whatever the scale is.
    seen, made = contexts(pipe, true_cfg_scale=3.0)
    assert [condition for _, condition, _ in seen] == [("cond",), ("cond",)]
    assert made.guidance is False


def test_an_edit_of_one_pass_leaves_the_other_alone(pipe):
    outputs = {}

    def run(name, *instruments):
        with attach(pipe, *instruments):
            handle = pipe.transformer.register_forward_hook(
                lambda module, args, output: outputs.setdefault(name, []).append(output[0])
            )
            call(pipe, ["red fox"], guidance=True, steps=1)
            handle.remove()

    def conditional(activations, context):
        return Delta(context.row_condition()[:, None] * torch.linspace(-9, 9, WIDTH))

    run("plain", Watch(DOUBLE))
    run("edited", Edit(conditional, DOUBLE))
    assert [torch.equal(a, b) for a, b in zip(outputs["plain"], outputs["edited"], strict=True)] == [False, True]


def test_a_loop_of_ones_own_alternates_between_the_passes_when_it_says_that_it_guides(pipe):
    def run(guidance):
        watch = Watch(DOUBLE)
        ids = torch.zeros(4, 3)
        ids[:, 1], ids[:, 2] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
        with attach(pipe, watch) as session, session.call("red fox", guidance=guidance), torch.no_grad():
            for _ in range(4):
                pipe.transformer(
                    hidden_states=torch.zeros(1, 4, 64),
                    encoder_hidden_states=torch.zeros(1, 3, 32),
                    pooled_projections=torch.zeros(1, 16),
                    timestep=torch.ones(1),
                    img_ids=ids,
                    txt_ids=torch.zeros(3, 3),
                    guidance=torch.ones(1),
                )
        return [c.condition[0] for c in watch.contexts], watch.contexts[0].grid

    assert run(True) == (["cond", "uncond", "cond", "uncond"], (2, 2))
    assert run(False) == (["cond"] * 4, (2, 2))


@pytest.mark.skipif(not hasattr(diffusers, "FluxKontextPipeline"), reason="this diffusers has no FluxKontextPipeline")
@pytest.mark.parametrize("path", [DOUBLE, SINGLE, f"{SINGLE}.attn", f"{DOUBLE}.attn"])
def test_a_reference_image_is_not_part_of_the_image_that_is_being_made(path):
    pipe = build(pipeline="FluxKontextPipeline")
    reference = torch.randn(1, 16, 4, 12, generator=torch.Generator().manual_seed(1))  # 2 x 6 tokens of it
    image, text = at(Watch(), (path, "image")), at(Watch(), (path, "text"))
    made = {"image": reference, "max_area": 32 * 64, "size": "wide", "guidance": False}
    plain = call(pipe, ["red fox"], **made)
    with attach(pipe, image, text, at(Edit(zero), (path, "image"), (path, "text"))):
        assert torch.equal(call(pipe, ["red fox"], **made), plain)
    assert (image.contexts[0].grid, image.contexts[0].positions) == ((4, 8), 32)
    assert text.contexts[0].positions == TEXT_TOKENS

    def one_row(activations, context):
        rows = torch.zeros_like(activations.rows).view(1, 4, 8, -1)
        rows[0, 2, 5] = torch.linspace(-30, 30, WIDTH)
        return Delta(rows.flatten(0, 2))

    with attach(pipe, Edit(one_row, SINGLE)):
        edited = call(pipe, ["red fox"], steps=1, **made)
    changed = (call(pipe, ["red fox"], steps=1, **made) != edited).any(-1)
    assert changed.nonzero().tolist() == [[0, 2 * 8 + 5]]


def test_image_to_image_is_followed_although_the_model_is_given_thousandths():
    pipe = build(pipeline="FluxImg2ImgPipeline")
    watch = Watch(DOUBLE)
    arguments = {"image": torch.rand(1, 3, 32, 64), "strength": 0.5, "steps": 8, "size": "wide"}
    with attach(pipe, watch) as run:
        call(pipe, ["red fox"], guidance=False, **arguments)
    assert [c.step for c in watch.contexts] == [0, 1, 2, 3]
    assert run.calls[0].call.n_steps == 4
    assert [c.fraction for c in watch.contexts] == pytest.approx([0.5, 0.625, 0.75, 0.875])


def test_asking_for_a_stream_that_is_not_there_names_those_that_are(pipe):
    where = Hookpoint(f"{DOUBLE}.ff", stream="text")
    watch = Watch()
    watch._hookpoints = (where,)
    with pytest.raises(
        ValueError, match=r"transformer_blocks.0.ff has no text stream in this FluxPipeline, only image"
    ):
        attach(pipe, watch)


def test_the_only_stream_of_a_text_module_is_meant_when_nobody_said_so(pipe):
    watch = Watch(f"{DOUBLE}.ff_context")
    with attach(pipe, watch):
        call(pipe, ["red fox"], guidance=False, steps=1)
    assert (watch.contexts[0].stream, watch.contexts[0].grid) == ("text", None)


# Single blocks of either kind, by what they give: diffusers before 0.35 had one tensor in and one out.


@pytest.mark.parametrize("together", [True, False])
def test_a_single_block_may_give_one_sequence_or_two(together):
    family = Flux()
    path = "single_transformer_blocks.3"
    text, image = torch.randn(2, 5, 4), torch.randn(2, 6, 4)
    ids = torch.tensor([(0, y, x) for y in range(2) for x in range(3)])
    given_to_model = {
        "hidden_states": torch.zeros(2, 6, 64),
        "encoder_hidden_states": torch.zeros(2, 5, 8),
        "img_ids": ids,
    }
    run = Run(nn.Identity(), given_to_model, (2, 3))
    whole = torch.cat([text, image], 1) if together else (text, image)
    given = {"hidden_states": whole} if together else {"hidden_states": image, "encoder_hidden_states": text}
    for stream, expected in (("text", text), ("image", image)):
        part = family.output_part(path, stream, whole, run)
        assert torch.equal(part.of(whole if together else whole[part.index]), expected)
        part = family.input_part(
            path, stream, lambda name: given.get(name, given["hidden_states"] if name is None else None), run
        )
        assert torch.equal(part.of(given[part.name]), expected)


def test_the_grid_and_the_rows_are_those_of_the_image_that_is_made_among_the_ids():
    y, x = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    ids = torch.stack([torch.zeros(3, 5), y, x], -1).flatten(0, 1)
    other = torch.stack([torch.ones(2, 2), *torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")], -1)
    other = other.flatten(0, 1)

    def told(ids):
        found = told_by_ids(ids)
        return found and (found.grid, found.side)

    assert told(ids) == ((3, 5), Side(0, 15))
    assert told(torch.cat([ids, other])) == ((3, 5), Side(0, 15, 4))
    assert told(torch.cat([other, ids])) == ((3, 5), Side(4, 15))
    assert told(torch.cat([other, ids, other])) == ((3, 5), Side(4, 15, 4))
    assert told(torch.cat([ids, torch.zeros(15, 1)], 1)[None]) == ((3, 5), Side(0, 15))  # a batch, and a fourth number
    assert told(ids + torch.tensor([0, 7, 2])) == ((3, 5), Side(0, 15))
    assert told(ids[:-1]) is None
    assert told(ids.flip(0)) is None  # not in row-major order
    assert told(other) is None  # no image is made
    assert told(torch.cat([ids[:8], other, ids[8:]])) is None
