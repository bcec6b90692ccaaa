"""Wan: one tensor through blocks with self- and cross-attention; conditions in two passes; Wan 2.2 has two models, the
first for the noisy part of the schedule.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.text import tiny_t5, tiny_words

MAX_TOKENS = 8
SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 5  # 2 latent frames


def _transformer(seed: int) -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=24,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    ).eval()


def tiny_wan_vae(seed: int = 2) -> Any:
    """Shrinks by 8 and 4 frames to one, but for the first."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def build(two_models: bool = False, seed: int = 0) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    more = {"transformer_2": _transformer(seed + 3), "boundary_ratio": 0.6} if two_models else {}
    pipe = WanPipeline(
        tokenizer=tiny_words(model_max_length=MAX_TOKENS),
        text_encoder=tiny_t5(24, seed=seed + 1, kind="UMT5"),
        vae=tiny_wan_vae(seed + 2),
        transformer=_transformer(seed),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **more,
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
            "height": height,
            "width": width,
            "num_frames": FRAMES,
            "num_inference_steps": steps,
            "guidance_scale": 5.0 if guidance else 1.0,
            "num_videos_per_prompt": images_per_prompt,
            "generator": torch.Generator().manual_seed(seed),
            "max_sequence_length": MAX_TOKENS,
            "output_type": "latent",
            **arguments,
        },
    ).frames


FAMILY = TinyFamily(
    name="wan",
    title="Wan 2.1, 2.2",
    pipeline="WanPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.blocks.0", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.blocks.1", "image", 24, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("text_encoder.encoder.block.0", "text", 24),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.blocks.1.attn2",),
    options={"one model": {}},
)
