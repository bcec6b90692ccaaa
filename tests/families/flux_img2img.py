"""FLUX's image-to-image: the denoiser enters its schedule in the middle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tests.families import flux
from tests.families.latents import SIZES


def build() -> Any:
    return flux.build(pipeline="FluxImg2ImgPipeline")


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    image = torch.rand(len(prompts), 3, *SIZES[size], generator=torch.Generator().manual_seed(seed + 100))
    arguments = {"image": image, "strength": 0.5, **arguments}
    return flux.call(pipe, prompts, size=size, steps=2 * steps, seed=seed, **arguments)


FAMILY = replace(
    flux.FAMILY,
    name="flux_img2img",
    title="FLUX.1 image-to-image",
    pipeline="FluxImg2ImgPipeline",
    build=build,
    call=call,
    options={},
)
