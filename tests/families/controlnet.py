"""ControlNet: a second denoiser that runs before the UNet in every step."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily, sd
from tests.tiny import tiny_sd, tiny_sdxl


def build(xl: bool = False, seed: int = 0) -> Any:
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionXLControlNetPipeline

    base = tiny_sdxl(seed=seed) if xl else tiny_sd(seed=seed)
    torch.manual_seed(seed + 4)
    controlnet = ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8, 16)).eval()
    for parameter in controlnet.parameters():  # its output layers begin as zeros, behind which no edit is seen
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    if xl:
        pipe = StableDiffusionXLControlNetPipeline(**base.components, controlnet=controlnet, add_watermarker=False)
    else:
        parts = {**base.components, "controlnet": controlnet}
        pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(
    pipe: Any, prompts: list[str], *, size: str = "square", steps: int = 2, seed: int = 0, **arguments: Any
) -> torch.Tensor:
    height, width = sd.SIZES[size]
    image = torch.rand(len(prompts), 3, height, width, generator=torch.Generator().manual_seed(seed + 100))
    # The image's features come at a quarter of its size, the size of the latents here.
    arguments = {"image": image, "negative_prompt": ["cat"] * len(prompts), **arguments}
    return sd.call(pipe, prompts, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="controlnet",
    title="SD and SDXL ControlNet",
    pipeline="StableDiffusionControlNetPipeline",
    build=build,
    call=call,
    blocks=(
        *(block for block in sd.BLOCKS if "down_blocks" not in block.path),
        Block("controlnet.mid_block.attentions.0", "image", 32, square=(4, 4), wide=(3, 5)),
    ),
    attentions=sd.ATTENTIONS,
    options={"SD": {}, "SDXL": {"xl": True}},
)
