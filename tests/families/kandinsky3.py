"""Kandinsky 3: a UNet of its own kind, guided by a T5."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet
from tests.families.text import tiny_t5, tiny_words

SIZES = {"square": (32, 32), "wide": (32, 64)}


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    unet = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=3,
        block_out_channels=(16, 32),
        cross_attention_dim=8,
        encoder_hid_dim=32,
    ).eval()
    movq = diffusers.VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=2,
        num_vq_embeddings=8,
    ).eval()
    return quiet(
        diffusers.Kandinsky3Pipeline(
            tokenizer=tiny_words(model_max_length=16),
            text_encoder=tiny_t5(32, seed=1),
            unet=unet,
            scheduler=diffusers.DDPMScheduler(),
            movq=movq,
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
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="kandinsky3",
    title="Kandinsky 3",
    pipeline="Kandinsky3Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("unet.down_blocks.0.resnets_in.1", "image", 16, (8, 8), (8, 16)),
        Block("unet.down_blocks.1.attentions.1", "image", 32, (4, 4), (4, 8)),
        Block("unet.up_blocks.0.resnets_in.0", "image", 32, (4, 4), (4, 8)),
        Block("unet.up_blocks.1.attentions.2", "image", 16, (8, 8), (8, 16)),
    ),
)
