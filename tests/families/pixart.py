"""PixArt: a T5, blocks of self-attention, cross-attention and feed-forward. `build(sigma=False)` is PixArt-alpha."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_kl
from tests.families.text import tiny_t5, tiny_words
from tests.tiny import tiny_scheduler

WIDTH = 16


def build(sigma: bool = True, pipeline: str | None = None) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=WIDTH,
        caption_channels=32,
        norm_num_groups=4,
    ).eval()
    torch.nn.init.normal_(transformer.scale_shift_table)
    name = pipeline or ("PixArtSigmaPipeline" if sigma else "PixArtAlphaPipeline")
    return quiet(
        getattr(diffusers, name)(
            transformer=transformer,
            scheduler=tiny_scheduler("ddim"),
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
    arguments = {
        "guidance_scale": 4.5 if guidance else 1.0,
        "max_sequence_length": 12,
        "use_resolution_binning": False,
        "clean_caption": False,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="pixart",
    title="PixArt-α, PixArt-Σ",
    pipeline="PixArtSigmaPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.attn1", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.attn2", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    attentions=("transformer.transformer_blocks.0.attn1", "transformer.transformer_blocks.1.attn2"),
    options={"alpha": {"sigma": False}},
)
