"""SDXL and Turbo: two text encoders, a UNet whose middle levels have transformers of several blocks."""

from __future__ import annotations

from typing import Any

from tests.families import Block, TinyFamily, sd
from tests.tiny import tiny_sdxl

BLOCKS = (
    Block("unet.down_blocks.1.attentions.0", "image", 32, square=(8, 8), wide=(5, 9)),
    Block("unet.mid_block.attentions.0", "image", 32, square=(4, 4), wide=(3, 5)),
    Block("unet.up_blocks.1.attentions.1", "image", 32, square=(8, 8), wide=(5, 9)),
    Block("text_encoder.encoder.layers.0", "text", 32),
    Block("text_encoder_2.encoder.layers.0", "text", 24),
)


def build(scheduler: str = "euler", seed: int = 0) -> Any:
    return tiny_sdxl(scheduler, seed=seed)


def call(pipe: Any, prompts: list[str], **arguments: Any) -> Any:
    # Without a negative prompt SDXL takes zeros for it and does not run its text encoders a second time.
    return sd.call(pipe, prompts, **{"negative_prompt": ["cat"] * len(prompts), **arguments})


FAMILY = TinyFamily(
    name="sdxl",
    title="SDXL, SDXL Turbo",
    pipeline="StableDiffusionXLPipeline",
    build=build,
    call=call,
    blocks=BLOCKS,
    attentions=("unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2",),
)
