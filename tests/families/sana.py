"""Sana: a Gemma 2 with an instruction before the prompt, linear self-attention, cross-attention, and a feed-forward of
convolutions.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16
INSTRUCTION = ["photo of the snow", "User Prompt: "]


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=WIDTH,
        caption_channels=32,
        sample_size=8,
    ).eval()
    vae = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    ).eval()
    return quiet(
        diffusers.SanaPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=vae,
            text_encoder=tiny_decoder("Gemma2Model", seed=1),
            tokenizer=tiny_words(bos=True, eos=False),
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
        "guidance_scale": 4.5 if guidance else 1.0,
        "max_sequence_length": 10,
        "use_resolution_binning": False,
        "complex_human_instruction": INSTRUCTION,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="sana",
    title="Sana",
    pipeline="SanaPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (8, 8), (8, 16)),
        Block("transformer.transformer_blocks.0.attn1", "image", WIDTH, (8, 8), (8, 16)),
        Block("transformer.transformer_blocks.0.attn2", "image", WIDTH, (8, 8), (8, 16)),
        Block("transformer.transformer_blocks.1.ff", "image", WIDTH, (8, 8), (8, 16)),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (8, 8), (8, 16)),
    ),
    attentions=("transformer.transformer_blocks.0.attn2",),
)
