"""Lumina-Next: a Gemma, blocks with self-attention and cross-attention, the conditional half of the batch first."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4,
        patch_size=2,
        in_channels=4,
        hidden_size=WIDTH,
        num_layers=2,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=32,
    ).eval()
    torch.nn.init.normal_(transformer.pad_token)
    for layer in transformer.layers:
        torch.nn.init.normal_(layer.gate)
    return quiet(
        diffusers.LuminaPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_decoder("GemmaModel", seed=1),
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
        "clean_caption": False,
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="lumina",
    title="Lumina-Next",
    pipeline="LuminaPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.layers.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.feed_forward", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond", "uncond"),),
)
