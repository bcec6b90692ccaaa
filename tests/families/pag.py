"""Perturbed-attention guidance: a third condition after the usual two."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import TinyFamily, sd
from tests.tiny import tiny_sd, tiny_sdxl


def build(xl: bool = False, seed: int = 0) -> Any:
    from diffusers import StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline

    if xl:
        parts = tiny_sdxl(seed=seed).components
        pipe = StableDiffusionXLPAGPipeline(**parts, add_watermarker=False, pag_applied_layers=["mid"])
    else:
        parts = tiny_sd(seed=seed).components
        pipe = StableDiffusionPAGPipeline(**parts, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any, prompts: list[str], *, guidance: bool, **arguments: Any) -> torch.Tensor:
    arguments = {"negative_prompt": ["cat"] * len(prompts), "pag_scale": 3.0 if guidance else 0.0, **arguments}
    return sd.call(pipe, prompts, guidance=guidance, **arguments)


FAMILY = TinyFamily(
    name="pag",
    title="Perturbed-attention guidance (SD, SDXL)",
    pipeline="StableDiffusionPAGPipeline",
    build=build,
    call=call,
    blocks=tuple(block for block in sd.BLOCKS if "down_blocks" not in block.path),
    attentions=sd.ATTENTIONS,
    layout=(("uncond", "cond", "perturbed"),),
    options={"SD": {}, "SDXL": {"xl": True}},
)
