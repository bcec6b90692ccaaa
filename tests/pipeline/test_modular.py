"""The promises of `attach` on modular pipelines: blocks, guiders, components in a manager.

What is conditional is found by changing a prompt and looking which runs of the denoiser are given another text.
"""

from __future__ import annotations

import functools

import diffusers
import pytest
import torch
from torch import nn

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.modular import PIPELINES
from tests.pipeline.state import everything
from tests.tiny import tiny_scheduler, tiny_sdxl

modular = pytest.importorskip("diffusers.modular_pipelines")
guiders = pytest.importorskip("diffusers.guiders")


@functools.lru_cache(maxsize=1)
def build(name, manager=None):
    blocks = getattr(modular, PIPELINES[name][0], None)
    if blocks is None or (name != "sdxl" and not families()[name].available):
        pytest.skip(f"{PIPELINES[name][0]} is not in this diffusers")
    pipe = blocks().init_pipeline(components_manager=manager) if manager else blocks().init_pipeline()
    parts = (tiny_sdxl() if name == "sdxl" else families()[name].build()).components
    pipe.update_components(**{n: p for n, p in parts.items() if n in pipe.component_names and p is not None})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe, name, prompt="a fox", **arguments):
    generator = torch.Generator().manual_seed(3)
    given = {**PIPELINES[name][2], "num_inference_steps": 2, **arguments}
    return pipe(prompt=prompt, generator=generator, output="latents", **given)


def with_guider(pipe, kind, **options):
    pipe.update_components(guider=getattr(guiders, kind)(**options))


def changed_texts(pipe, name, **other):
    """For each run of the denoiser in the first step, whether the text it is given changes with the arguments."""
    root = getattr(pipe, PIPELINES[name][1].partition(".")[0])
    heard = []

    def listen(module, args, kwargs):
        texts = [kwargs.get(n) for n in ("encoder_hidden_states", "cap_feats") if kwargs.get(n) is not None]
        texts = texts or [a for a in args if isinstance(a, list)][-1:]
        heard.append(torch.cat([t.flatten() for t in (texts[0] if isinstance(texts[0], list) else texts)]))

    handle = root.register_forward_pre_hook(listen, with_kwargs=True)
    said = {} if name == "flux" else {"negative_prompt": "blue dog"}
    call(pipe, name, **said)
    first = list(heard)
    heard.clear()
    call(pipe, name, **{**said, **other})
    handle.remove()
    return [not (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(first, heard, strict=True)]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_promise_on_a_modular_pipeline(name):
    pipe = build(name)
    if name != "flux":
        with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0)
    path = PIPELINES[name][1]
    alone = call(pipe, name)
    before = everything(pipe)
    watch = Watch(path)
    with attach(pipe, watch, Edit(zero, path, f"{path}:input", f"{path}:diff")) as run:
        same = call(pipe, name)
    assert torch.equal(same, alone)
    assert everything(pipe) == before
    assert [c.condition[0] == "cond" for c in watch.contexts] == changed_texts(pipe, name, prompt="red cat")
    runs = len(watch.contexts) // 2
    assert [(c.step, c.n_steps, c.fraction) for c in watch.contexts] == [(0, 2, 0.0)] * runs + [(1, 2, 0.5)] * runs
    assert run.calls[0].call.prompts == ["a fox"]
    with attach(pipe, Edit(push(8.0), path)):
        assert not torch.equal(call(pipe, name), alone)
    assert torch.equal(call(pipe, name), alone)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_on_a_modular_pipeline(error):
    pipe = build("sdxl")
    with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0)
    call(pipe, "sdxl")  # what libraries put in at a first call is not ours
    before = everything(pipe)

    def fail(activations, context):
        raise error("in the middle")

    with pytest.raises(error, match="in the middle"), attach(pipe, Edit(fail, PIPELINES["sdxl"][1])):
        call(pipe, "sdxl")
    assert everything(pipe) == before


def test_guiders_name_the_passes_of_a_step_and_a_skipped_block_is_not_visited():
    pipe, path = build("ltx"), "transformer.transformer_blocks"
    config = diffusers.hooks.LayerSkipConfig(indices=[0], fqn="transformer_blocks")
    with_guider(
        pipe,
        "SkipLayerGuidance",
        guidance_scale=4.0,
        skip_layer_config=config,
        **{f"skip_layer_guidance_{end}": value for end, value in (("start", 0.0), ("stop", 1.0))},
    )
    skipped, kept = Watch(f"{path}.0"), Watch(f"{path}.1")
    alone = call(pipe, "ltx")
    before = everything(pipe)
    with attach(pipe, skipped, kept, Edit(zero, f"{path}.0", f"{path}.1")):
        assert torch.equal(call(pipe, "ltx"), alone)
    # diffusers' skip-layer guidance begins after the first step.
    assert [c.condition[0] for c in kept.contexts] == ["cond", "uncond", "cond", "uncond", "perturbed"]
    assert [c.condition[0] for c in skipped.contexts] == ["cond", "uncond", "cond", "uncond"]
    assert everything(pipe) == before


def test_guidance_that_ends_halfway_leaves_the_conditional_pass():
    pipe = build("sdxl")
    with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0, stop=0.5)
    with attach(pipe, watch := Watch(PIPELINES["sdxl"][1])):
        call(pipe, "sdxl", num_inference_steps=4)
    assert [c.condition[0] for c in watch.contexts] == ["cond", "uncond"] * 2 + ["cond"] * 2
    assert [c.step for c in watch.contexts] == [0, 0, 1, 1, 2, 3]


def test_image_to_image_begins_where_the_call_begins():
    pipe = build("sdxl")
    with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=1.0)
    with attach(pipe, watch := Watch(PIPELINES["sdxl"][1])):
        call(pipe, "sdxl", image=torch.rand(1, 3, 64, 64), strength=0.5, num_inference_steps=6)
    assert [(c.step, c.n_steps, c.fraction) for c in watch.contexts] == [
        (0, 3, pytest.approx(3 / 6)),
        (1, 3, pytest.approx(4 / 6)),
        (2, 3, pytest.approx(5 / 6)),
    ]


def test_texts_and_images_of_a_modular_pipeline_are_told_apart():
    pipe = build("sdxl")
    with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0)
    image, text = Watch(PIPELINES["sdxl"][1]), Watch("text_encoder.encoder.layers.0")
    ids = []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda m, args: ids.extend(args[0].tolist()))
    with attach(pipe, image, text):
        call(pipe, "sdxl", ["a fox", "red cat"], negative_prompt=["dog", "no"], num_images_per_prompt=2)
    handle.remove()
    said = {
        p: pipe.tokenizer(p, padding="max_length", max_length=16).input_ids for p in ("a fox", "red cat", "dog", "no")
    }
    rows = [(c, i) for context in text.contexts for c, i in zip(context.condition, context.prompt_index, strict=True)]
    truth = {"a fox": ("cond", 0), "red cat": ("cond", 2), "dog": ("uncond", 0), "no": ("uncond", 2)}
    assert rows == [truth[next(p for p in said if said[p] == row)] for row in ids]
    assert {c.prompt_index for c in image.contexts} == {(0, 1, 2, 3)}


def test_pipelines_that_share_components_in_a_manager_have_a_session_each():
    manager = diffusers.modular_pipelines.ComponentsManager()
    first = build("sdxl", manager)
    second = modular.StableDiffusionXLAutoBlocks().init_pipeline(components_manager=manager)
    parts = first.components.items()
    second.update_components(**{n: p for n, p in parts if n in second.component_names and isinstance(p, nn.Module)})
    second.update_components(**{n: p for n, p in tiny_sdxl().components.items() if n.startswith("tokenizer")})
    second.update_components(scheduler=tiny_scheduler("euler"))
    second.set_progress_bar_config(disable=True)
    path = PIPELINES["sdxl"][1]
    a, b = Watch(path), Watch(path)
    with attach(first, a) as low:
        with pytest.raises(RuntimeError, match="another pipeline that shares the model"):
            call(second, "sdxl")
        with attach(second, b) as high:
            call(first, "sdxl")
            call(second, "sdxl", num_inference_steps=3)
    assert (low.calls[0].call.n_steps, high.calls[0].call.n_steps) == (2, 3)
    assert ({c.n_steps for c in a.contexts}, {c.n_steps for c in b.contexts}) == ({2}, {3})
