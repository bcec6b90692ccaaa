"""Ovis-Image: FLUX's blocks, guided by a Qwen 3 whose chat has an instruction before the prompt; two passes."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.flux2 import CHAT
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return quiet(
        diffusers.OvisImagePipeline(
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_decoder("Qwen3Model", seed=1),
            tokenizer=tiny_words(eos=False, chat_template=CHAT),
            transformer=transformer,
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
        "negative_prompt": ["cat"] * len(prompts),
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 12,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="ovis",
    title="Ovis-Image",
    pipeline="OvisImagePipeline",
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
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
)
