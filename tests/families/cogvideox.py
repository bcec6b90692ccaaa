"""CogVideoX: joint blocks that give (video, text); the 5B models with rotary positions, the 2B with added ones."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.text import tiny_t5, tiny_words

MAX_TOKENS = 8
SIZES = {"square": (64, 64), "wide": (48, 80)}  # pixels, high and wide; 16 to a patch
FRAMES = 5  # 2 latent frames


def build(rotary: bool = True, seed: int = 0) -> Any:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=FRAMES,
        max_text_seq_length=MAX_TOKENS,
        use_rotary_positional_embeddings=rotary,
    ).eval()
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()
    pipe = CogVideoXPipeline(
        tokenizer=tiny_words(model_max_length=MAX_TOKENS),
        text_encoder=tiny_t5(24, seed=seed + 1),
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
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
    name="cogvideox",
    title="CogVideoX",
    pipeline="CogVideoXPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 32, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("transformer.transformer_blocks.0", "text", 32),
        Block("transformer.transformer_blocks.1", "image", 32, square=(2, 4, 4), wide=(2, 3, 5)),
        Block("text_encoder.encoder.block.0", "text", 24),
    ),
    attentions=("transformer.transformer_blocks.1.attn1",),
    options={"rotary": {}, "added positions": {"rotary": False}},
)
