"""Mochi: joint blocks that give (video, text), which attend to each text without its padding."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_flow
from tests.families.text import tiny_t5, tiny_words

SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 7  # 2 latent frames


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        qk_norm="rms_norm",
        text_embed_dim=32,
        time_embed_dim=4,
        activation_fn="swiglu",
        max_sequence_length=16,
    ).eval()
    torch.nn.init.normal_(transformer.pos_frequencies)
    vae = diffusers.AutoencoderKLMochi(
        latent_channels=12,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    return quiet(
        diffusers.MochiPipeline(
            scheduler=tiny_flow(),
            vae=vae,
            text_encoder=tiny_t5(32, seed=1),
            tokenizer=tiny_words(),
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
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 8,
        "num_frames": FRAMES,
        "sizes": SIZES,
        **arguments,
    }
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="mochi",
    title="Mochi",
    pipeline="MochiPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 16, (2, 4, 4), (2, 3, 5)),
        Block("transformer.transformer_blocks.0", "text", 16),
        Block("transformer.transformer_blocks.0.ff", "image", 16, (2, 4, 4), (2, 3, 5)),
        Block("transformer.transformer_blocks.1", "image", 16, (2, 4, 4), (2, 3, 5)),
    ),
)
