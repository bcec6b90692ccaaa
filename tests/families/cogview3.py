"""CogView 3 Plus: joint blocks that give (image, text), inside them one sequence [text; image]; a T5."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_kl
from tests.families.text import tiny_t5, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.CogView3PlusTransformer2DModel(
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=4,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=8,
    ).eval()
    return quiet(
        diffusers.CogView3PlusPipeline(
            tokenizer=tiny_words(model_max_length=16),
            text_encoder=tiny_t5(32, seed=1),
            vae=tiny_kl(4),
            transformer=transformer,
            scheduler=diffusers.CogVideoXDDIMScheduler(),
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
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 16,
        "height": 48,
        "width": 48 if size == "square" else 96,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="cogview3",
    title="CogView 3 Plus",
    pipeline="CogView3PlusPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.attn1", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (6, 6), (6, 12)),
        Block("transformer.transformer_blocks.0.ff", "text", WIDTH),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (6, 6), (6, 12)),
    ),
    attentions=("transformer.transformer_blocks.0.attn1",),
)
