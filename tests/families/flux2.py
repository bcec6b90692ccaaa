"""FLUX.2 [klein]: a Qwen 3 whose hidden states of several layers are the text, guidance in two passes."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(**options: Any) -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=64,
        timestep_guidance_channels=16,
        guidance_embeds=False,
        axes_dims_rope=(2, 2, 2, 2),
    ).eval()
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()
    return quiet(
        diffusers.Flux2KleinPipeline(
            transformer=transformer,
            scheduler=tiny_flow(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=tiny_decoder("Qwen3ForCausalLM", seed=1),
            tokenizer=tiny_words(eos=False, chat_template=CHAT),
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
    arguments.pop("negative_prompt", None)  # this pipeline has none: the empty text is its negative
    arguments = {
        "guidance_scale": 4.0 if guidance else 1.0,
        "max_sequence_length": 16,
        "text_encoder_out_layers": (1, 2),
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="flux2",
    title="FLUX.2",
    pipeline="Flux2KleinPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.attn", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.attn", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0.ff_context", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.1.attn", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
    attentions=("transformer.transformer_blocks.0.attn", "transformer.single_transformer_blocks.1.attn"),
)
