"""Latte: blocks over the places of a frame and blocks over the frames of a place, each folded into the batch."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import quiet, tiny_kl
from tests.families.text import tiny_t5, tiny_words

WIDTH = 16
FRAMES = 3


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.LatteTransformer3DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=WIDTH,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        video_length=FRAMES,
    ).eval()
    return quiet(
        diffusers.LattePipeline(
            tokenizer=tiny_words(model_max_length=16),
            text_encoder=tiny_t5(32, seed=1),
            vae=tiny_kl(4),
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
    height, width = (32, 32) if size == "square" else (32, 64)
    return pipe(
        **{
            "prompt": prompts,
            "height": height,
            "width": width,
            "video_length": FRAMES,
            "guidance_scale": 4.0 if guidance else 1.0,
            "num_images_per_prompt": images_per_prompt,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "clean_caption": False,
            "output_type": "latents",
            **arguments,
        }
    ).frames


FAMILY = TinyFamily(
    name="latte",
    title="Latte",
    pipeline="LattePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (FRAMES, 4, 4), (FRAMES, 4, 8)),
        Block("transformer.transformer_blocks.1.ff", "image", WIDTH, (FRAMES, 4, 4), (FRAMES, 4, 8)),
        Block("transformer.temporal_transformer_blocks.0", "image", WIDTH),
    ),
)
