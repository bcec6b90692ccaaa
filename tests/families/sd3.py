"""Stable Diffusion 3: two CLIPs and a T5, joint blocks, the last of them without a text stream.

`build(dual=True)` is SD3.5-medium's: the first block has a second attention of the image alone. `t5=False` leaves the T5 out;
`joint` is the width of the text.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_t5, tiny_words
from tests.tiny import tiny_clip, tiny_tokenizer

WIDTH = 16
TEXT_TOKENS = 16 + 12  # CLIP's, then T5's `max_sequence_length`


def build(
    dual: bool = False,
    pipeline: str = "StableDiffusion3Pipeline",
    layers: int = 2,
    t5: bool = True,
    joint: int = 32,
    **options: Any,
) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=layers,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=joint,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=24,
        pos_embed_max_size=16,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    ).eval()
    return quiet(
        getattr(diffusers, pipeline)(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(),
            text_encoder=tiny_clip(16, layers=2, projection=12, seed=1),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_clip(16, layers=2, projection=12, seed=2),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=tiny_t5(joint, seed=3) if t5 else None,
            tokenizer_3=tiny_words() if t5 else None,
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
    arguments = {"guidance_scale": 5.0 if guidance else 1.0, "max_sequence_length": 12, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="sd3",
    title="Stable Diffusion 3, 3.5",
    pipeline="StableDiffusion3Pipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.attn", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.ff_context", "text", WIDTH),
        Block("transformer.transformer_blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    attentions=("transformer.transformer_blocks.0.attn",),
    options={"dual attention": {"dual": True}},
)
