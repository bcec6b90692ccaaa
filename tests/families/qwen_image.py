"""Qwen-Image: Qwen2.5-VL with a template around the prompt, joint blocks, guidance in two passes."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.text import tiny_qwen_vl, tiny_words

WIDTH = 16


def tiny_qwen_vae(seed: int = 2) -> Any:
    """Shrinks by 4."""
    import diffusers

    torch.manual_seed(seed)
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def build(pipeline: str = "QwenImagePipeline", **options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return quiet(
        getattr(diffusers, pipeline)(
            transformer=transformer,
            scheduler=tiny_flow(use_dynamic_shifting=True),
            vae=tiny_qwen_vae(),
            text_encoder=tiny_qwen_vl(32, seed=1),
            tokenizer=tiny_words(eos=False),
            **options,
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
    negative = {"negative_prompt": ["blue dog"] * len(prompts)} if guidance else {}
    true_cfg = {"true_cfg_scale": 4.0 if guidance else 1.0, **negative}
    arguments = {"max_sequence_length": 12, **true_cfg, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="qwen_image",
    title="Qwen-Image",
    pipeline="QwenImagePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.attn", "text", WIDTH),
        Block("transformer.transformer_blocks.0.img_mlp", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.txt_mlp", "text", WIDTH),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn",),
)
