"""Stable Diffusion 1.x and 2.x: a UNet, guidance in one batch."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.tiny import tiny_sd

SIZES = {"square": (64, 64), "wide": (40, 72)}  # pixels; four to a latent, and 10 x 18 latents halve to 5 x 9 and 3 x 5
BLOCKS = (
    Block("unet.down_blocks.0.attentions.0", "image", 16, square=(16, 16), wide=(10, 18)),
    Block("unet.mid_block.attentions.0", "image", 32, square=(4, 4), wide=(3, 5)),
    Block("unet.up_blocks.1.attentions.1", "image", 32, square=(8, 8), wide=(5, 9)),
    Block("unet.up_blocks.1.attentions.1.transformer_blocks.0", "image", 32, square=(8, 8), wide=(5, 9)),
    Block("text_encoder.encoder.layers.0", "text", 32),
)
ATTENTIONS = ("unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2",)


def build(scheduler: str = "ddim", seed: int = 0, **unet: Any) -> Any:
    return tiny_sd(scheduler, seed=seed, **unet)


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
        prompts,
        **{
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_images_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        },
    ).images


FAMILY = TinyFamily(
    name="sd",
    title="Stable Diffusion 1.x, 2.x",
    pipeline="StableDiffusionPipeline",
    build=build,
    call=call,
    blocks=BLOCKS,
    attentions=ATTENTIONS,
)
