"""HunyuanVideo: double and single blocks, both give (video, text); Llama and CLIP texts; guidance given to the model as
a number, or in two passes with `true_cfg_scale`.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.text import tiny_decoder, tiny_words
from tests.tiny import tiny_clip, tiny_tokenizer

TEMPLATE = {"template": "describe the video : {}", "crop_start": 4}
MAX_TOKENS = 8
SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 5  # 2 latent frames


def build(seed: int = 0) -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    torch.manual_seed(seed)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
    ).eval()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
    pipe = HunyuanVideoPipeline(
        text_encoder=tiny_decoder("LlamaModel", layers=4, seed=seed + 1),
        tokenizer=tiny_words(model_max_length=MAX_TOKENS + TEMPLATE["crop_start"]),
        text_encoder_2=tiny_clip(seed=seed + 2, max_tokens=77),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
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
    return pipe(
        prompt=prompts,
        **{
            "negative_prompt": ["cat"] * len(prompts),
            "true_cfg_scale": 5.0 if guidance else 1.0,
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "num_videos_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "prompt_template": TEMPLATE,
            "max_sequence_length": MAX_TOKENS,
            "output_type": "latent",
            **arguments,
        },
    ).frames


FAMILY = TinyFamily(
    name="hunyuan_video",
    title="HunyuanVideo",
    pipeline="HunyuanVideoPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 32, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.transformer_blocks.0", "text", 32),
        Block("transformer.single_transformer_blocks.0", "image", 32, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.single_transformer_blocks.0", "text", 32),
        Block("text_encoder.layers.0", "text", 32),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
)
