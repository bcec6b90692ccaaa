"""Stable Cascade's prior: a UNet named `prior` on a small latent, the conditional half of the batch first."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families import Block, TinyFamily
from tests.families.latents import quiet
from tests.tiny import tiny_tokenizer


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    prior = diffusers.StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        switch_level=(False,),
        clip_image_in_channels=32,
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=32,
        dropout=(0.0, 0.0),
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        timestep_conditioning_type=("sca", "crp"),
    ).eval()
    for parameter in prior.parameters():  # some begin at zero, and nothing would go through
        torch.nn.init.normal_(parameter, std=0.2)
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
    return quiet(
        diffusers.StableCascadePriorPipeline(
            tokenizer=tokenizer,
            text_encoder=transformers.CLIPTextModelWithProjection(config).eval(),
            prior=prior,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
            resolution_multiple=4,
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
    made = pipe(
        **{
            "prompt": prompts,
            "height": 32,
            "width": 32 if size == "square" else 64,
            "guidance_scale": 4.0 if guidance else 1.0,
            "num_images_per_prompt": images_per_prompt,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            **arguments,
        }
    )
    return made.image_embeddings


FAMILY = TinyFamily(
    name="stable_cascade",
    title="Stable Cascade (prior)",
    pipeline="StableCascadePriorPipeline",
    build=build,
    call=call,
    blocks=(
        Block("prior.down_blocks.0.0", "image", 16, (8, 8), (8, 16)),
        Block("prior.down_blocks.0.2", "image", 16, (8, 8), (8, 16)),
        Block("prior.down_blocks.1.2", "image", 16, (8, 8), (8, 16)),
        Block("prior.up_blocks.1.0", "image", 16, (8, 8), (8, 16)),
    ),
    layout=(("cond", "uncond"),),
)
