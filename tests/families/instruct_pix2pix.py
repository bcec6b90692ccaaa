"""InstructPix2Pix: three conditions in a batch, the text first, the image second, nothing last."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import TinyFamily, sd
from tests.tiny import tiny_sd


def build(seed: int = 0) -> Any:
    from diffusers import StableDiffusionInstructPix2PixPipeline

    parts = tiny_sd(seed=seed, in_channels=8).components
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    height, width = sd.SIZES[size]
    image = torch.rand(len(prompts), 3, height, width, generator=torch.Generator().manual_seed(seed + 100))
    return _without_size(pipe, prompts, image=image, steps=steps, seed=seed, **arguments)


def _without_size(
    pipe: Any,
    prompts: list[str],
    *,
    guidance: bool,
    images_per_prompt: int = 1,
    steps: int,
    seed: int,
    **arguments: Any,
) -> torch.Tensor:
    return pipe(
        prompts,
        **{
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "image_guidance_scale": 1.5,
            "num_images_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        },
    ).images


FAMILY = TinyFamily(
    name="instruct_pix2pix",
    title="InstructPix2Pix",
    pipeline="StableDiffusionInstructPix2PixPipeline",
    build=build,
    call=call,
    blocks=sd.BLOCKS,
    attentions=sd.ATTENTIONS,
    layout=(("cond", "image", "uncond"),),
)
