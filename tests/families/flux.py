"""FLUX.1: a CLIP for the pooled text and a T5, double blocks and single blocks, guidance as a number the model is given
or, with `true_cfg_scale` and a negative prompt, in two passes.

In the square there are as many text tokens as image tokens: a stream may not be told by its length.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_t5, tiny_words
from tests.tiny import tiny_clip, tiny_tokenizer

WIDTH = 16
TEXT_TOKENS = 16


def build(embedded: bool = True, pipeline: str = "FluxPipeline", **options: Any) -> Any:
    """`embedded=False` is schnell's: no guidance embedding."""
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        guidance_embeds=embedded,
        axes_dims_rope=(2, 2, 4),
    ).eval()
    return quiet(
        getattr(diffusers, pipeline)(
            transformer=transformer,
            scheduler=tiny_flow(use_dynamic_shifting=True),
            vae=tiny_kl(),
            text_encoder=tiny_clip(16, layers=2, seed=1),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_t5(32, seed=2),
            tokenizer_2=tiny_words(),
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
    true_cfg = {"true_cfg_scale": 3.0, "negative_prompt": ["blue dog"] * len(prompts)} if guidance else {}
    arguments = {"guidance_scale": 3.5, "max_sequence_length": TEXT_TOKENS, **true_cfg, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="flux",
    title="FLUX.1",
    pipeline="FluxPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.1.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1.attn", "text", WIDTH),
        Block("transformer.transformer_blocks.1.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.1.ff_context", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0.attn", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
    options={"schnell": {"embedded": False}},
)
