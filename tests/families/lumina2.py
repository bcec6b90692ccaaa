"""Lumina 2: a Gemma 2 with a system prompt, two refiners, layers over texts of different lengths and the image."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 24


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(64, 16, 16),
        cap_feat_dim=32,
    ).eval()
    return quiet(
        diffusers.Lumina2Pipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_decoder("Gemma2Model", seed=1),
            tokenizer=tiny_words(bos=True, eos=False),
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
        "system_prompt": "a photo",
        "cfg_normalization": False,
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="lumina2",
    title="Lumina 2",
    pipeline="Lumina2Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.layers.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.feed_forward", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.noise_refiner.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.context_refiner.0", "text", WIDTH),
        Block("transformer.layers.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.layers.0.attn",),
)
