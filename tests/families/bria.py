"""Bria 3: FLUX's blocks, guided by a T5 in one batch of both conditions."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_t5, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.BriaTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=None,
        axes_dims_rope=[0, 4, 4],
    ).eval()
    return quiet(
        diffusers.BriaPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_t5(32, seed=1),
            tokenizer=tiny_words(),
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
    arguments = {"guidance_scale": 4.0 if guidance else 1.0, "max_sequence_length": 12, **arguments}
    arguments.setdefault("height", 32)
    arguments.setdefault("width", 32 if size == "square" else 64)
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="bria",
    title="Bria 3",
    pipeline="BriaPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.ff_context", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    attentions=("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
)
