"""Cosmos Predict 2: one tensor through blocks with self- and cross-attention, two passes; an image is one frame."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.text import tiny_t5, tiny_words
from tests.families.wan import tiny_wan_vae


class _Passes:
    """In the place of the guardrail, a package of its own."""

    def to(self, *args: Any, **kwargs: Any) -> _Passes:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=32,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        patch_size=(1, 2, 2),
        rope_scale=(2.0, 1.0, 1.0),
        concat_padding_mask=False,
        extra_pos_embed_type="learnable",
    ).eval()
    return quiet(
        diffusers.Cosmos2TextToImagePipeline(
            text_encoder=tiny_t5(32, seed=1),
            tokenizer=tiny_words(),
            transformer=transformer,
            vae=tiny_wan_vae(),
            scheduler=tiny_flow(use_karras_sigmas=True),
            safety_checker=_Passes(),
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
        "max_sequence_length": 8,
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="cosmos",
    title="Cosmos Predict 2",
    pipeline="Cosmos2TextToImagePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", 24, (1, 4, 4), (1, 4, 8)),
        Block("transformer.transformer_blocks.0.ff", "image", 24, (1, 4, 4), (1, 4, 8)),
        Block("transformer.transformer_blocks.1", "image", 24, (1, 4, 4), (1, 4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.1.attn2",),
)
