"""The promises of `attach` on modular pipelines: blocks, guiders, components in a manager.

What is conditional is found by changing a prompt and looking which runs of the denoiser are given another text.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types

import diffusers
import pytest
import torch
from torch import nn

from sparsefeat.pipeline import attach
from tests.families import families
from tests.pipeline.instruments import Edit, Watch, push, zero
from tests.pipeline.knowing.test_what_changes import kept
from tests.pipeline.knowing.test_what_changes import rows as batch_rows
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


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Wan's blocks mend the encoding of the prompt by a package that is not needed here."""
    if hasattr(modular, "WanBlocks"):
        wan = importlib.import_module("diffusers.modular_pipelines.wan.encoders")
        monkeypatch.setattr(wan, "ftfy", types.SimpleNamespace(fix_text=str), raising=False)


def call(pipe, name, prompt="a fox", **arguments):
    generator = torch.Generator().manual_seed(3)
    given = {**PIPELINES[name][2], "num_inference_steps": 2, **arguments}
    return pipe(prompt=prompt, generator=generator, output="latents", **given)


def with_guider(pipe, kind, **options):
    pipe.update_components(guider=getattr(guiders, kind)(**options))


def guide(pipe, name):
    if name not in ("flux", "ltx2"):  # FLUX.1's is a number for the model, and LTX-2 has a guider of its own
        with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0)


def inputs(pipe):
    return {taken.name for taken in pipe.blocks.inputs}


def changed_texts(pipe, name, **other):
    """For each run of the denoiser in the first step, whether the text it is given changes with the arguments."""
    root = getattr(pipe, PIPELINES[name][1].partition(".")[0])
    heard = []

    def listen(module, args, kwargs):
        texts = [kwargs.get(n) for n in ("encoder_hidden_states", "cap_feats") if kwargs.get(n) is not None]
        texts = texts or [a for a in args if isinstance(a, list)][-1:]
        heard.append(torch.cat([t.flatten() for t in (texts[0] if isinstance(texts[0], list) else texts)]))

    handle = root.register_forward_pre_hook(listen, with_kwargs=True)
    said = {"negative_prompt": "blue dog"} if "negative_prompt" in inputs(pipe) else {}
    call(pipe, name, **said)
    first = list(heard)
    heard.clear()
    call(pipe, name, **{**said, **other})
    handle.remove()
    return [not (a.shape == b.shape and torch.equal(a, b)) for a, b in zip(first, heard, strict=True)]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_promise_on_a_modular_pipeline(name):
    pipe = build(name)
    guide(pipe, name)
    path = PIPELINES[name][1]
    alone = call(pipe, name)
    before = everything(pipe)
    watch = Watch(path)
    with attach(pipe, watch, Edit(zero, path, f"{path}:input", f"{path}:diff")) as run:
        same = call(pipe, name)
    assert torch.equal(same, alone)
    assert everything(pipe) == before
    assert [c.condition[0] in ("cond", "perturbed") for c in watch.contexts] == changed_texts(
        pipe, name, prompt="red cat"
    )
    runs = len(watch.contexts) // 2
    assert [(c.step, c.n_steps, c.fraction) for c in watch.contexts] == [(0, 2, 0.0)] * runs + [(1, 2, 0.5)] * runs
    assert run.calls[0].call.prompts == ["a fox"]
    with attach(pipe, Edit(push(8.0), path)):
        assert not torch.equal(call(pipe, name), alone)
    assert torch.equal(call(pipe, name), alone)


@pytest.mark.parametrize(("n_prompts", "each"), [(2, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_label_of_every_row_is_what_changes_with_its_prompt(name, n_prompts, each):
    pipe = build(name)
    guide(pipe, name)
    prompts, other = ["a fox", "red cat"][:n_prompts], "red fox"
    number = {"num_images_per_prompt", "num_videos_per_prompt"} & inputs(pipe)
    each = each if number else 1
    more = dict.fromkeys(number, each)
    negatives = ["blue dog", "no"][:n_prompts] if "negative_prompt" in inputs(pipe) else None
    # The blocks of SDXL repeat the pooled texts of several prompts for several images as a whole: they are mixed up.
    mixed = ("added_cond_kwargs",) if name == "sdxl" and n_prompts > 1 and each > 1 else ()

    def rows(prompts):
        heard = []

        def listen(module, args, kwargs):
            names = list(inspect.signature(type(module).forward).parameters)[1:]
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            found = [list(batch_rows(kept(v), n_prompts * each)) for n, v in given.items() if n not in mixed]
            heard.append([batch for batches in found for batch in batches])

        root = getattr(pipe, PIPELINES[name][1].partition(".")[0])
        handle = root.register_forward_pre_hook(listen, with_kwargs=True)
        try:
            said = {} if negatives is None else {"negative_prompt": list(negatives)}
            call(pipe, name, list(prompts), num_inference_steps=1, **said, **more)  # Z-Image's writes into the lists
        finally:
            handle.remove()
        return heard

    try:
        rows(prompts)
    except (RuntimeError, ValueError) as error:
        pytest.skip(f"diffusers' own blocks fail: {error}")
    with attach(pipe, watch := Watch(PIPELINES[name][1])) as run:
        before = rows(prompts)
    assert run.calls[0].call.prompts == prompts
    assert len(before) == len(watch.contexts)
    for altered in range(n_prompts):
        after = rows([other if i == altered else prompt for i, prompt in enumerate(prompts)])
        for context, old, new in zip(watch.contexts, before, after, strict=True):
            assert old
            for entry, (condition, image) in enumerate(context.entries):
                changes = not all(alike(a[entry], b[entry]) for a, b in zip(old, new, strict=True))
                assert changes == (condition in ("cond", "perturbed") and image // each == altered), (entry, condition)


def alike(a, b):
    """A text beside another one in a batch is padded otherwise, and rounded otherwise."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=1e-5)


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


@pytest.mark.parametrize("guided", [True, False])
def test_flux3_which_is_modular_only_keeps_its_promises(guided):
    blocks = getattr(modular, "Flux3AutoBlocks", None)
    if blocks is None:
        pytest.skip("this diffusers has no FLUX.3")
    blocks = blocks()
    for encodes in ("prompt_upsampler", "text_encoder"):
        blocks.sub_blocks.pop(encodes)
    pipe = blocks.init_pipeline()
    torch.manual_seed(0)
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 2, 2)}
    channels = {"in_channels": 16, "cond_in_channels": 16, "joint_attention_dim": 16}
    transformer = diffusers.Flux3Transformer2DModel(num_layers=1, num_single_layers=2, **channels, **sizes).eval()
    vae = families()["flux2"].build().vae
    pipe.update_components(transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    with_guider(pipe, "ClassifierFreeGuidance", guidance_scale=4.0 if guided else 1.0)
    generator = torch.Generator().manual_seed(1)
    embeds = {f"{which}prompt_embeds": torch.randn(1, 5, 16, generator=generator) for which in ("", "negative_")}

    def run():
        generator = torch.Generator().manual_seed(3)
        return pipe(height=64, width=96, num_inference_steps=2, generator=generator, output="latents", **embeds)

    alone, before = run(), everything(pipe)
    paths = ("transformer.mode_blocks.image.0", "transformer.single_transformer_blocks.0")
    watch, text = Watch(*paths), Watch(*(f"{path}:text" for path in ("transformer.txt_mode_blocks.0", paths[1])))
    with attach(pipe, watch, text, Edit(zero, *paths, f"{paths[1]}:diff", f"{paths[1]}:text")):
        assert torch.equal(run(), alone)
    assert everything(pipe) == before
    runs = ["cond", "uncond"] if guided else ["cond"]
    assert [c.condition for c in watch.contexts] == [(run,) for _ in range(2) for run in runs for _ in paths]
    assert {c.grid for c in watch.contexts} == {alone.shape[-2:]}
    assert {tuple(tensor.shape) for tensor in text.tensors} == {(1, 5, 16)}
    for path in (*paths, f"{paths[1]}:text", "transformer.txt_mode_blocks.0:text"):
        with attach(pipe, Edit(push(8.0), path)):
            assert not torch.equal(run(), alone)


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
