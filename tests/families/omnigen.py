"""OmniGen: one sequence [text; time; image] and no text encoder; it always runs on [cond, uncond]."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import VOCABULARY, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers
    from diffusers.pipelines.omnigen import pipeline_omnigen

    if not hasattr(pipeline_omnigen, "OmniGenMultiModalProcessor"):
        pipeline_omnigen.OmniGenMultiModalProcessor = _processor()
    torch.manual_seed(0)
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=WIDTH,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=32,
        num_layers=2,
        in_channels=4,
        time_step_dim=4,
        pad_token_id=0,
        vocab_size=VOCABULARY,
        rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    ).eval()
    return quiet(
        diffusers.OmniGenPipeline(
            transformer=transformer,
            scheduler=tiny_flow(invert_sigmas=True, num_train_timesteps=1),
            vae=tiny_kl(4, levels=4),
            tokenizer=tiny_words(eos=False),
        )
    )


def _processor() -> Any:
    """diffusers' own, whose import needs torchvision for images that nobody gives it here."""
    from diffusers.pipelines.omnigen import processor_omnigen

    processor_omnigen.transforms = mock.MagicMock()
    return processor_omnigen.OmniGenMultiModalProcessor


def call(
    pipe: Any,
    prompts: list[str],
    *,
    guidance: bool,
    images_per_prompt: int = 1,
    size: str = "square",
    steps: int = 2,
    seed: int = 0,
    **arguments: Any,
) -> torch.Tensor:
    arguments = {
        "guidance_scale": 3.0 if guidance else 1.0,
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="omnigen",
    title="OmniGen",
    pipeline="OmniGenPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.layers.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.mlp", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond", "uncond"),),
    guidance="always",
)
