"""Chroma: FLUX.1's blocks without a pooled text; single blocks give one sequence [text; image]; two passes."""

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
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    ).eval()
    return quiet(
        diffusers.ChromaPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(),
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
    arguments = {"guidance_scale": 5.0 if guidance else 1.0, "max_sequence_length": 12, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="chroma",
    title="Chroma",
    pipeline="ChromaPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn",),
)
