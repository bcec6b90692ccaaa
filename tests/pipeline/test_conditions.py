"""What a call's arguments say of guidance and images, and which layouts of the denoiser's batch are known.

That the rows of real pipelines are what they are called is in test_transformer.py and test_context.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparsefeat.pipeline import Call
from sparsefeat.pipeline.conditions import denoiser_entries


def pipe(name="FluxPipeline", guidance_embeds=None, **properties):
    config = SimpleNamespace() if guidance_embeds is None else SimpleNamespace(guidance_embeds=guidance_embeds)
    instance = type(name, (), {key: property(lambda self, v=value: v) for key, value in properties.items()})()
    instance.transformer = SimpleNamespace(config=config)
    return instance


@pytest.mark.parametrize(
    ("arguments", "guidance"),
    [
        ({"true_cfg_scale": 4.0, "negative_prompt": ""}, True),
        ({"true_cfg_scale": 4.0, "negative_prompt": None}, False),
        ({"true_cfg_scale": 4.0, "negative_prompt": None, "negative_prompt_embeds": torch.zeros(1, 2, 3)}, True),
        ({"true_cfg_scale": 1.0, "negative_prompt": "cat", "guidance_scale": 3.5}, False),
        ({"guidance_scale": 5.0}, True),
        ({"guidance_scale": 1.0}, False),
        ({"guidance_scale": None}, False),
        ({}, False),
    ],
)
def test_guidance_is_told_by_the_arguments(arguments, guidance):
    assert Call.of(pipe(), {"prompt": "fox", **arguments}).guidance is guidance


def test_a_scale_that_the_model_is_given_is_no_guidance_unless_the_pipeline_says_so():
    arguments = {"prompt": "fox", "guidance_scale": 30.0}
    for embedded in (True, False):
        assert Call.of(pipe("FluxFillPipeline", guidance_embeds=embedded), arguments).guidance is False
    assert Call.of(pipe("WanPipeline", guidance_embeds=False, do_classifier_free_guidance=True), arguments).guidance


@pytest.mark.parametrize("name", ["num_images_per_prompt", "num_videos_per_prompt"])
def test_images_and_videos_per_prompt_are_counted(name):
    call = Call.of(pipe(), {"prompt": ["fox", "cat"], name: 3})
    assert (call.prompts, call.images_per_prompt, call.n_images) == (["fox", "cat"], 3, 6)
    assert Call.of(pipe(), {"prompt": ["fox", "cat"], name: None}).n_images == 2


@pytest.mark.parametrize("embeds", [torch.zeros(3, 7, 4), [torch.zeros(5, 4), torch.zeros(9, 4), torch.zeros(2, 4)]])
def test_embeddings_instead_of_prompts_are_counted_as_a_tensor_and_as_a_list(embeds):
    call = Call.of(pipe(), {"prompt": None, "prompt_embeds": embeds, "num_images_per_prompt": 2})
    assert (call.prompts, call.n_images) == (None, 6)


@pytest.mark.parametrize(
    ("name", "guidance", "batch", "earlier", "conditions"),
    [
        ("StableDiffusion3Pipeline", True, 4, (), ("uncond", "uncond", "cond", "cond")),
        ("LuminaPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("LuminaText2ImgPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("ZImagePipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("ZImagePipeline", False, 2, (), ("cond", "cond")),
        ("DiTPipeline", True, 4, (), ("cond", "cond", "uncond", "uncond")),
        ("HunyuanDiTPipeline", True, 4, (), ("uncond", "uncond", "cond", "cond")),
        ("FluxPipeline", True, 2, (), ("cond", "cond")),
        ("FluxPipeline", True, 2, (2,), ("uncond", "uncond")),
        ("FluxPipeline", True, 2, (2, 2), ("cond", "cond")),  # a loop without a scheduler
        ("FluxPipeline", False, 2, (2,), ("cond", "cond")),
        ("StableDiffusion3Pipeline", True, 2, (4,), ("perturbed", "perturbed")),
    ],
)
def test_the_conditions_of_a_run_by_pipeline_batch_and_the_runs_before_it(name, guidance, batch, earlier, conditions):
    call = Call(prompts=["fox", "cat"], guidance=guidance)
    found, images = denoiser_entries(pipe(name), call, batch, earlier)
    assert found == conditions
    assert images == (0, 1) * (batch // 2)


def test_in_a_loop_of_ones_own_a_run_without_guidance_is_conditional_whatever_ran_before():
    call = Call(prompts=["fox", "cat"], guidance=True, own_loop=True)
    assert denoiser_entries(pipe("StableDiffusionPipeline"), call, 2, (4,))[0] == ("cond", "cond")
