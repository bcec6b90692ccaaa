"""Krea 2: one sequence [text; image] from beginning to end; a Qwen 3 VL whose layers are the text; two passes."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.qwen_image import tiny_qwen_vae
from tests.families.text import tiny_qwen3_vl, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=16,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return quiet(
        diffusers.Krea2Pipeline(
            scheduler=tiny_flow(use_dynamic_shifting=True),
            vae=tiny_qwen_vae(),
            text_encoder=tiny_qwen3_vl(seed=1),
            tokenizer=tiny_words(eos=False),
            transformer=transformer,
            text_encoder_select_layers=(1, 2),
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
        "guidance_scale": 4.0 if guidance else 0.0,
        "max_sequence_length": 16,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="krea2",
    title="Krea 2",
    pipeline="Krea2Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
)
