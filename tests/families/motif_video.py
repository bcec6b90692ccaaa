"""Motif-Video: double blocks, single blocks and a decoder of single blocks; a guider runs the model once for each condition."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_flow
from tests.families.text import tiny_t5, tiny_words
from tests.families.wan import FRAMES, MAX_TOKENS, SIZES, tiny_wan_vae

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.MotifVideoTransformer3DModel(
        in_channels=9,  # the latent, that of a first frame and its mask
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=3,
        num_decoder_layers=1,
        mlp_ratio=2.0,
        text_embed_dim=24,
        rope_axes_dim=(2, 2, 4),
    ).eval()
    return quiet(
        diffusers.MotifVideoPipeline(
            scheduler=tiny_flow(),
            vae=tiny_wan_vae(),
            text_encoder=tiny_t5(24, seed=1),
            tokenizer=tiny_words(model_max_length=MAX_TOKENS),
            transformer=transformer,
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
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
    (pipe.guider.enable if guidance else pipe.guider.disable)()
    arguments = {
        "negative_prompt": ["cat"] * len(prompts) if guidance else None,
        "num_frames": FRAMES,
        "max_sequence_length": MAX_TOKENS,
        "sizes": SIZES,
        **arguments,
    }
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="motif_video",
    title="Motif-Video",
    pipeline="MotifVideoPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (2, 4, 4), (2, 3, 5)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (2, 4, 4), (2, 3, 5)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.2", "image", WIDTH, (2, 4, 4), (2, 3, 5)),
        Block("text_encoder.encoder.block.0", "text", 24),
    ),
    layout=(("cond",), ("uncond",)),
)
