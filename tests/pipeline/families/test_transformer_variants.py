"""What pipelines are made of transformers besides text-to-image: perturbed-attention guidance, ControlNets, image to
image. The models are the same, their batches and schedules are not.
"""

from __future__ import annotations

import diffusers
import pytest
import torch

from sparsefeat.pipeline import attach
from tests.families import families
from tests.families.latents import quiet, tiny_kl
from tests.pipeline.families.test_transformer import at
from tests.pipeline.instruments import Watch, WatchAttention
from tests.tiny import tiny_scheduler

# Optional parts that a pipeline has and its relative does not take.
_OPTIONAL = ("image_encoder", "feature_extractor", "safety_checker")


def relative(pipe, name, **more):
    """Another pipeline over the same models; skipped where this diffusers has none of the name."""
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")
    parts = {part: value for part, value in pipe.components.items() if part not in _OPTIONAL}
    made = cls(**parts, **more)
    made.set_progress_bar_config(disable=True)
    return made


PAG = [
    ("sd3", "StableDiffusion3PAGPipeline", "transformer.transformer_blocks.1", "blocks.1"),
    ("pixart", "PixArtSigmaPAGPipeline", "transformer.transformer_blocks.1", "blocks.1"),
    ("sana", "SanaPAGPipeline", "transformer.transformer_blocks.1", "blocks.1"),
]


@pytest.mark.parametrize(("name", "pipeline", "path", "layer"), PAG)
@pytest.mark.parametrize(
    ("guidance", "scale", "layout"),
    [
        (True, 3.0, ("uncond", "cond", "perturbed")),
        (True, 0.0, ("uncond", "cond")),
        (False, 3.0, ("cond", "perturbed")),
        (False, 0.0, ("cond",)),
    ],
)
def test_perturbed_guidance_adds_a_chunk(name, pipeline, path, layer, guidance, scale, layout):
    family = families()[name]
    pipe, watch = relative(family.build(), pipeline, pag_applied_layers=[layer]), Watch(path)
    with attach(pipe, watch):
        family.call(pipe, ["red fox", "a cat"], guidance=guidance, size="wide", pag_scale=scale)
    assert [c.condition for c in watch.contexts] == [tuple(c for c in layout for _ in range(2))] * 2
    assert watch.contexts[0].prompt_index == (0, 1) * len(layout)
    assert watch.contexts[0].grid == family.blocks[0].wide


@pytest.mark.parametrize("guidance", [True, False])
def test_a_tap_on_a_perturbed_attention_sees_its_two_parts(guidance):
    family = families()["sd3"]
    pipe = relative(family.build(), "StableDiffusion3PAGPipeline", pag_applied_layers=["blocks.1"])
    watch = WatchAttention("transformer.transformer_blocks.1.attn", "transformer.transformer_blocks.0.attn")
    with attach(pipe, watch):
        family.call(pipe, ["red fox"], guidance=guidance, steps=1, pag_scale=3.0)
    seen = {(call.path[-6:], call.index): (call.query.shape[0], context.condition) for call, context in watch.seen}
    usual = ("uncond", "cond") if guidance else ("cond",)
    assert seen == {
        ("0.attn", 0): (len(usual) + 1, (*usual, "perturbed")),
        ("1.attn", 0): (len(usual), usual),
        ("1.attn", 1): (1, ("perturbed",)),
    }


def test_the_controlnet_of_flux_is_a_denoiser_with_both_streams():
    family = families()["flux"]
    base = family.build()
    torch.manual_seed(1)
    heads = {"attention_head_dim": 8, "num_attention_heads": 2}
    model = diffusers.FluxControlNetModel.from_transformer(base.transformer, num_layers=1, num_single_layers=1, **heads)
    pipe = relative(base, "FluxControlNetPipeline", controlnet=model)
    image = Watch("controlnet.transformer_blocks.0")
    text = at(Watch(), ("controlnet.single_transformer_blocks.0", "text"))
    with attach(pipe, image, text):
        family.call(pipe, ["red fox"], guidance=False, size="wide", control_image=torch.rand(1, 3, 32, 64))
    assert [(c.step, c.condition, c.grid) for c in image.contexts] == [(0, ("cond",), (4, 8)), (1, ("cond",), (4, 8))]
    assert [(c.stream, c.grid, c.positions) for c in text.contexts] == [("text", None, 16)] * 2


def test_the_controlnet_of_sd3_has_the_conditions_of_its_batch():
    family = families()["sd3"]
    base = family.build()
    torch.manual_seed(1)
    more = {"num_layers": 1, "num_extra_conditioning_channels": 0}
    pipe = relative(
        base,
        "StableDiffusion3ControlNetPipeline",
        controlnet=diffusers.SD3ControlNetModel.from_transformer(base.transformer, **more),
    )
    watch = Watch("controlnet.transformer_blocks.0")
    with attach(pipe, watch):
        family.call(pipe, ["red fox"], guidance=True, size="wide", control_image=torch.rand(1, 3, 32, 64))
    assert [(c.step, c.condition, c.grid) for c in watch.contexts] == [(s, ("uncond", "cond"), (4, 8)) for s in (0, 1)]


@pytest.mark.parametrize(
    ("name", "pipeline", "path"),
    [
        ("sd3", "StableDiffusion3Img2ImgPipeline", "transformer.transformer_blocks.0"),
        ("flux", "FluxImg2ImgPipeline", "transformer.transformer_blocks.0"),
        ("qwen_image", "QwenImageImg2ImgPipeline", "transformer.transformer_blocks.0"),
    ],
)
def test_image_to_image_begins_where_the_schedule_is(name, pipeline, path):
    family = families()[name]
    if not family.available:
        pytest.skip(f"this diffusers has no {family.pipeline}")
    pipe, watch = relative(family.build(), pipeline), Watch(path)
    arguments = {"image": torch.rand(1, 3, 32, 64), "strength": 0.5, "steps": 8, "size": "wide"}
    with attach(pipe, watch):
        family.call(pipe, ["red fox"], guidance=True, **arguments)
    runs = len(family.layout)
    assert [c.condition for c in watch.contexts] == [*family.layout] * 4
    assert [c.step for c in watch.contexts[::runs]] == [0, 1, 2, 3]
    assert {c.n_steps for c in watch.contexts} == {4}
    assert [c.fraction for c in watch.contexts[::runs]] == pytest.approx([0.5, 0.625, 0.75, 0.875])
    assert watch.contexts[0].grid == (4, 8)


@pytest.mark.parametrize("guidance", [True, False])
def test_dit_has_classes_for_prompts_and_the_conditional_half_first(guidance):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        norm_num_groups=4,
        num_embeds_ada_norm=1001,  # the last one is the class of no class
    )
    pipe = quiet(diffusers.DiTPipeline(transformer.eval(), tiny_kl(4), tiny_scheduler()))
    labels, watch = [], Watch("transformer.transformer_blocks.0")
    with attach(pipe, watch):
        handle = transformer.register_forward_pre_hook(
            lambda module, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
        )
        pipe(class_labels=[3, 5], guidance_scale=4.0 if guidance else 1.0, num_inference_steps=2, output_type="np")
        handle.remove()
    assert len(labels) == len(watch.contexts) == 2
    for given, context in zip(labels, watch.contexts, strict=True):
        assert [condition == "uncond" for condition in context.condition] == [label == 1000 for label in given]
        assert [(3, 5)[image] for image in context.prompt_index][:2] == given[:2]
        assert context.grid == (4, 4)
