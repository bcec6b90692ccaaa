"""HunyuanImage 2.1: double blocks and single blocks that give (image, text); a Qwen 2.5 VL, and a ByT5 for what stands in
quotes; a guider runs the model once for each condition.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow
from tests.families.text import tiny_qwen_vl, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        patch_size=(1, 1),
        text_embed_dim=32,
        text_embed_2_dim=8,
        rope_axes_dim=(4, 4),
    ).eval()
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=8,
        sample_size=64,
        scaling_factor=0.5,
    ).eval()
    byt5 = transformers.T5Config(vocab_size=384, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    pipe = quiet(
        diffusers.HunyuanImagePipeline(
            scheduler=tiny_flow(),
            vae=vae,
            text_encoder=tiny_qwen_vl(32, layers=3, seed=1),
            tokenizer=tiny_words(eos=False),
            text_encoder_2=transformers.T5EncoderModel(byt5).eval(),
            tokenizer_2=transformers.ByT5Tokenizer(),
            transformer=transformer,
            guider=diffusers.AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        )
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 16, 8
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "photo of {}", 2
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
    (pipe.guider.enable if guidance else pipe.guider.disable)()
    arguments = {
        "negative_prompt": ["cat"] * len(prompts),
        "height": 32,
        "width": 32 if size == "square" else 64,
        **arguments,
    }
    prompts = [f'{prompt} "{prompt}"' for prompt in prompts]  # ByT5 reads what stands in quotes
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="hunyuan_image",
    title="HunyuanImage 2.1",
    pipeline="HunyuanImagePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.transformer_blocks.0", "text", WIDTH),
        Block("transformer.transformer_blocks.0.ff_context", "text", WIDTH),
        Block("transformer.single_transformer_blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.single_transformer_blocks.0", "text", WIDTH),
        Block("transformer.single_transformer_blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond",), ("uncond",)),
)
