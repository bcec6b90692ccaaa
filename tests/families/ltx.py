"""LTX-Video: a packed sequence of video tokens whose frames, height and width are arguments of the model."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.text import tiny_t5, tiny_words

MAX_TOKENS = 8
SIZES = {"square": (64, 64), "wide": (32, 96)}  # pixels, high and wide; 32 to a latent, as everywhere in LTX
FRAMES = 9


def build(seed: int = 0) -> Any:
    from diffusers import (
        AutoencoderKLLTXVideo,
        FlowMatchEulerDiscreteScheduler,
        LTXPipeline,
        LTXVideoTransformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        num_layers=2,
    ).eval()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    ).eval()
    pipe = LTXPipeline(
        tokenizer=tiny_words(model_max_length=MAX_TOKENS),
        text_encoder=tiny_t5(24, seed=seed + 1),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    height, width = SIZES[size]
    return pipe(
        prompt=prompts,
        **{
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_videos_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "max_sequence_length": MAX_TOKENS,
            "output_type": "latent",
            **arguments,
        },
    ).frames


FAMILY = TinyFamily(
    name="ltx",
    title="LTX-Video",
    pipeline="LTXPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 32, square=(2, 2, 2), wide=(2, 1, 3)),
        Block("transformer.transformer_blocks.1", "image", 32, square=(2, 2, 2), wide=(2, 1, 3)),
        Block("text_encoder.encoder.block.0", "text", 24),
    ),
    attentions=("transformer.transformer_blocks.1.attn2",),
)
