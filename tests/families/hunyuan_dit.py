"""HunyuanDiT: a BERT and a T5, blocks with self-attention and cross-attention, long skips between them."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_kl
from tests.families.text import VOCABULARY, tiny_t5, tiny_words
from tests.tiny import tiny_scheduler

WIDTH = 16


def build() -> Any:
    import diffusers
    import transformers

    torch.manual_seed(0)
    transformer = diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=WIDTH,
        num_layers=4,
        cross_attention_dim=24,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        use_style_cond_and_image_meta_size=False,
    ).eval()
    bert = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=80,
    )
    return quiet(
        diffusers.HunyuanDiTPipeline(
            transformer=transformer,
            scheduler=tiny_scheduler("ddim"),
            vae=tiny_kl(4, levels=4),  # the pipeline's rotary embeddings take the 8 for granted,
            text_encoder=transformers.BertModel(bert).eval(),
            tokenizer=tiny_words(),
            text_encoder_2=tiny_t5(32, seed=1),
            tokenizer_2=tiny_words(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
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
        "guidance_scale": 5.0 if guidance else 1.0,
        "use_resolution_binning": False,
        "height": 64,
        "width": 64 if size == "square" else 128,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="hunyuan_dit",
    title="HunyuanDiT",
    pipeline="HunyuanDiTPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.0.attn1", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.1.attn2", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.1.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.3", "image", WIDTH, (4, 4), (4, 8)),
    ),
    attentions=("transformer.blocks.0.attn1", "transformer.blocks.3.attn2"),
)
