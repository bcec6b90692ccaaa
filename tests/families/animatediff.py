"""AnimateDiff: Stable Diffusion's UNet with motion modules, a video's frames folded into the batch."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_kl
from tests.tiny import tiny_sd

FRAMES = 3
SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels; latents of a quarter, halved twice


def build() -> Any:
    import diffusers

    base = tiny_sd()
    torch.manual_seed(0)
    motion = diffusers.MotionAdapter(
        block_out_channels=(16, 32, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=4,
    )
    for parameter in motion.parameters():  # its last layers begin at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return quiet(
        diffusers.AnimateDiffPipeline(
            vae=tiny_kl(4),
            text_encoder=base.text_encoder,
            tokenizer=base.tokenizer,
            unet=base.unet,
            motion_adapter=motion.eval(),
            scheduler=base.scheduler,
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
    arguments = {"guidance_scale": 4.0 if guidance else 1.0, "num_frames": FRAMES, "sizes": SIZES, **arguments}
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="animatediff",
    title="AnimateDiff",
    pipeline="AnimateDiffPipeline",
    build=build,
    call=call,
    blocks=(
        Block("unet.down_blocks.1.attentions.0", "image", 32, (FRAMES, 8, 8), (FRAMES, 6, 10)),
        Block("unet.mid_block.attentions.0", "image", 32, (FRAMES, 4, 4), (FRAMES, 3, 5)),
        Block("unet.mid_block.attentions.0.transformer_blocks.0", "image", 32, (FRAMES, 4, 4), (FRAMES, 3, 5)),
        Block("unet.up_blocks.1.motion_modules.0", "image", 32, (FRAMES, 8, 8), (FRAMES, 6, 10)),
        Block("unet.mid_block.motion_modules.0.transformer_blocks.0", "image", 32),
    ),
)
