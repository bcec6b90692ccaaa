"""HiDream: two CLIPs, a T5 and a Llama whose layers are the text; an image that is not square is padded."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_decoder, tiny_t5, tiny_words
from tests.tiny import tiny_tokenizer

WIDTH = 32


def _clip(seed: int) -> Any:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return transformers.CLIPTextModelWithProjection(config).eval()


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 32],
        text_emb_dim=64,
        num_routed_experts=4,
        num_activated_experts=2,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(16, 16),
        llama_layers=(0, 1, 1, 0),
    ).eval()
    for name, parameter in transformer.named_parameters():  # the gates of its experts are left as they were in memory
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = quiet(
        diffusers.HiDreamImagePipeline(
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=_clip(1),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=_clip(2),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=tiny_t5(32, seed=3),
            tokenizer_3=tiny_words(),
            text_encoder_4=tiny_decoder("LlamaForCausalLM", seed=4),
            tokenizer_4=tiny_words(bos=True, eos=False),
            transformer=transformer,
        )
    )
    pipe.default_sample_size = 8  # it scales every size to this area
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
    arguments = {
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 8,
        "height": 32 if size == "square" else 16,
        "width": 32 if size == "square" else 64,
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="hidream",
    title="HiDream",
    pipeline="HiDreamImagePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.double_stream_blocks.0", "image", WIDTH, (4, 4), (2, 8)),
        Block("transformer.double_stream_blocks.0", "text", WIDTH),
        Block("transformer.double_stream_blocks.0.block.ff_t", "text", WIDTH),
        Block("transformer.double_stream_blocks.1.block.attn1", "image", WIDTH, (4, 4), (2, 8)),
        Block("transformer.single_stream_blocks.0", "image", WIDTH, (4, 4), (2, 8)),
        Block("transformer.single_stream_blocks.0", "text", WIDTH),
        Block("transformer.single_stream_blocks.1", "image", WIDTH, (4, 4), (2, 8)),
    ),
)
