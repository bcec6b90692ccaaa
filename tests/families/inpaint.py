"""Inpainting: nine input channels for SD, the mask blended in for SDXL."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import TinyFamily, sd
from tests.tiny import tiny_sd, tiny_sdxl


def build(xl: bool = False, seed: int = 0) -> Any:
    from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline

    if xl:
        pipe = StableDiffusionXLInpaintPipeline(**tiny_sdxl(seed=seed).components, add_watermarker=False)
    else:
        parts = tiny_sd(seed=seed, in_channels=9).components
        pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    height, width = sd.SIZES[size]
    image = torch.rand(len(prompts), 3, height, width, generator=torch.Generator().manual_seed(seed + 100))
    mask = torch.zeros(len(prompts), 1, height, width)
    mask[:, :, height // 4 :, : width // 2] = 1
    # At full strength nothing of the schedule is left out; SDXL's own default is 0.9999.
    arguments = {"image": image, "mask_image": mask, "strength": 1.0, **arguments}
    arguments = {"negative_prompt": ["cat"] * len(prompts), **arguments}
    return sd.call(pipe, prompts, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="inpaint",
    title="SD and SDXL inpainting",
    pipeline="StableDiffusionInpaintPipeline",
    build=build,
    call=call,
    blocks=tuple(block for block in sd.BLOCKS if "down_blocks" not in block.path),
    attentions=sd.ATTENTIONS,
    options={"SD": {}, "SDXL": {"xl": True}},
)
