"""CogView 4: joint blocks that give (image, text), whose feed-forward runs on one and then on the other; a GLM."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_kl
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.CogView4Transformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
    ).eval()
    return quiet(
        diffusers.CogView4Pipeline(
            tokenizer=tiny_words(eos=False, padding_side="left"),
            text_encoder=tiny_decoder("GlmModel", seed=1),
            vae=tiny_kl(4),
            transformer=transformer,
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
                base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear"
            ),
        )
    )


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
        "negative_prompt": ["cat"] * len(prompts),  # an empty text has no token here
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 16,
        "height": 48,  # 6 x 6 patches of the image, 16 tokens of the text
        "width": 48 if size == "square" else 96,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="cogview4",
    title="CogView 4",
    pipeline="CogView4Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.attn1", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0.attn1", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0.ff", "text", WIDTH),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (6, 6), (6, 12)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn1",),
)
