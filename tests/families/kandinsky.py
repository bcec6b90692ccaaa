"""Kandinsky 2.2's decoder: a UNet on image embeddings that a prior makes, without a text encoder or prompts."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily

SIZES = {"square": (32, 32), "wide": (20, 36)}  # pixels; two to a latent
EMBEDDING = 24


def build(seed: int = 0) -> Any:
    from diffusers import DDIMScheduler, KandinskyV22Pipeline, UNet2DConditionModel, VQModel

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        encoder_hid_dim=EMBEDDING,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=EMBEDDING,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    ).eval()
    movq = VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        num_vq_embeddings=8,
        vq_embed_dim=4,
        norm_type="spatial",
    ).eval()
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1)
    pipe = KandinskyV22Pipeline(unet=unet, scheduler=scheduler, movq=movq)
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
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2, len(prompts), EMBEDDING, generator=generator).to(pipe.unet.dtype)
    if not guidance:  # diffusers repeats the embeddings for several images a prompt only under guidance
        embeddings, images_per_prompt = embeddings.repeat_interleave(images_per_prompt, dim=1), 1
    return pipe(
        **{
            "image_embeds": embeddings[0],
            "negative_image_embeds": embeddings[1],
            "height": height,
            "width": width,
            "num_inference_steps": steps,
            "guidance_scale": 4.0 if guidance else 1.0,
            "num_images_per_prompt": images_per_prompt,
            "generator": generator,
            "output_type": "latent",
            **arguments,
        },
    ).images


FAMILY = TinyFamily(
    name="kandinsky",
    title="Kandinsky 2.2",
    pipeline="KandinskyV22Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("unet.mid_block.attentions.0", "image", 32, square=(8, 8), wide=(5, 9)),
        Block("unet.up_blocks.0.attentions.1", "image", 32, square=(8, 8), wide=(5, 9)),
    ),
)
