"""Sana-Video: one tensor through blocks with linear self-attention; a Gemma 2."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask_video, quiet, tiny_flow
from tests.families.text import tiny_decoder, tiny_words
from tests.families.wan import tiny_wan_vae

SIZES = {"square": (64, 64), "wide": (64, 96)}  # pixels, high and wide; 16 to a patch
FRAMES = 5  # 2 latent frames


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=32,
        mlp_ratio=2.5,
        dropout=0.0,
        attention_bias=False,
        sample_size=8,
        patch_size=(1, 2, 2),
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    ).eval()
    return quiet(
        diffusers.SanaVideoPipeline(
            tokenizer=tiny_words(bos=True, eos=False),
            text_encoder=tiny_decoder("Gemma2Model", seed=1),
            vae=tiny_wan_vae(),
            transformer=transformer,
            scheduler=tiny_flow(),
        )
    )


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
    arguments = {
        "guidance_scale": 4.0 if guidance else 1.0,
        "frames": FRAMES,
        "max_sequence_length": 8,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
        "negative_prompt": "cat",
        **arguments,
    }
    arguments = {"sizes": SIZES, **arguments}
    return ask_video(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="sana_video",
    title="Sana-Video",
    pipeline="SanaVideoPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 24, (2, 4, 4), (2, 4, 6)),
        Block("transformer.transformer_blocks.1.attn2", "image", 24, (2, 4, 4), (2, 4, 6)),
        Block("transformer.transformer_blocks.1", "image", 24, (2, 4, 4), (2, 4, 6)),
    ),
)
