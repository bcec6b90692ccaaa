"""AuraFlow: a UMT5, joint blocks and single blocks, register tokens before the text."""

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
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=WIDTH,
        out_channels=4,
        pos_embed_max_size=256,
    ).eval()
    return quiet(
        diffusers.AuraFlowPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_t5(32, seed=1, kind="UMT5"),
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
    arguments = {"guidance_scale": 3.5 if guidance else 1.0, "max_sequence_length": 12, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="aura_flow",
    title="AuraFlow",
    pipeline="AuraFlowPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.joint_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.joint_transformer_blocks.0", "text", WIDTH),
        Block("transformer.joint_transformer_blocks.0.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.joint_transformer_blocks.0.attn", "text", WIDTH),
        Block("transformer.joint_transformer_blocks.1.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.joint_transformer_blocks.1.ff_context", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
    ),
    attentions=("transformer.joint_transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
)
