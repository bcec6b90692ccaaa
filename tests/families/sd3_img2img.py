"""SD3's image-to-image: the denoiser enters its schedule in the middle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.families import sd3
from tests.families.latents import SIZES


def build() -> Any:
    return sd3.build(pipeline="StableDiffusion3Img2ImgPipeline")


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    image = torch.rand(len(prompts), 3, *SIZES[size], generator=torch.Generator().manual_seed(seed + 100))
    arguments = {"image": image, "strength": 0.5, **arguments}
    return sd3.call(pipe, prompts, size=size, steps=2 * steps, seed=seed, **arguments)


FAMILY = replace(
    sd3.FAMILY,
    name="sd3_img2img",
    title="SD3 image-to-image",
    pipeline="StableDiffusion3Img2ImgPipeline",
    build=build,
    call=call,
    options={},
)
