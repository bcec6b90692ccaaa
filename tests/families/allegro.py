"""Allegro: one tensor through blocks with self- and cross-attention; a T5."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet
from tests.families.text import tiny_t5, tiny_words

SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 8  # 2 latent frames


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=24,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=24,
    ).eval()
    vae = diffusers.AutoencoderKLAllegro(
        in_channels=3,
        out_channels=3,
        down_block_types=("AllegroDownBlock3D",) * 4,
        up_block_types=("AllegroUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    ).eval()
    return quiet(
        diffusers.AllegroPipeline(
            tokenizer=tiny_words(model_max_length=8),
            text_encoder=tiny_t5(24, seed=1),
            vae=vae,
            transformer=transformer,
            scheduler=diffusers.DDIMScheduler(),
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
        "num_frames": FRAMES,
        "max_sequence_length": 8,
        "clean_caption": False,
        **arguments,
    }
    arguments = {"sizes": SIZES, **arguments}
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="allegro",
    title="Allegro",
    pipeline="AllegroPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 24, (2, 4, 4), (2, 3, 5)),
        Block("transformer.transformer_blocks.0.ff", "image", 24, (2, 4, 4), (2, 3, 5)),
        Block("transformer.transformer_blocks.1", "image", 24, (2, 4, 4), (2, 3, 5)),
    ),
    attentions=("transformer.transformer_blocks.1.attn2",),
)
