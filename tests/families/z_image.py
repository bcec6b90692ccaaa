"""Z-Image: a Qwen 3, two refiners, layers over the image and the text, each padded; the model takes lists."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.flux2 import CHAT
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_decoder, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    ).eval()
    torch.nn.init.normal_(transformer.x_pad_token)
    torch.nn.init.normal_(transformer.cap_pad_token)
    return quiet(
        diffusers.ZImagePipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            vae=tiny_kl(4),
            text_encoder=tiny_decoder("Qwen3Model", seed=1),
            tokenizer=tiny_words(eos=False, chat_template=CHAT),
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
    prompts = list(prompts)  # the pipeline writes its template into the list
    arguments = {"guidance_scale": 4.0 if guidance else 0.0, "max_sequence_length": 16, **arguments}
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="z_image",
    title="Z-Image",
    pipeline="ZImagePipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.layers.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.attention", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.layers.0.feed_forward", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.noise_refiner.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.context_refiner.0", "text", WIDTH),
        Block("transformer.layers.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    layout=(("cond", "uncond"),),
    attentions=("transformer.layers.0.attention",),
)
