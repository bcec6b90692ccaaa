"""Image-to-image: the denoiser enters its schedule in the middle."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import TinyFamily, sd
from tests.tiny import tiny_sd, tiny_sdxl


def build(xl: bool = False, seed: int = 0) -> Any:
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline

    if xl:
        pipe = StableDiffusionXLImg2ImgPipeline(**tiny_sdxl(seed=seed).components, add_watermarker=False)
    else:
        pipe = StableDiffusionImg2ImgPipeline(**tiny_sd(seed=seed).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    height, width = sd.SIZES[size]
    image = torch.rand(len(prompts), 3, height, width, generator=torch.Generator().manual_seed(seed + 100))
    arguments = {"image": image, "strength": 0.5, **arguments}
    return _without_size(pipe, prompts, steps=2 * steps, seed=seed, **arguments)


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
    """The size is the given image's."""
    return pipe(
        prompts,
        **{
            "negative_prompt": ["cat"] * len(prompts),
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_images_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **arguments,
        },
    ).images


FAMILY = TinyFamily(
    name="img2img",
    title="SD and SDXL image-to-image",
    pipeline="StableDiffusionImg2ImgPipeline",
    build=build,
    call=call,
    blocks=tuple(block for block in sd.BLOCKS if "down_blocks" not in block.path),
    attentions=sd.ATTENTIONS,
    options={"SD": {}, "SDXL": {"xl": True}},
)
