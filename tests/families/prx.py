"""PRX: blocks of the image, whose attention has the text among its keys; a T5Gemma."""

from __future__ import annotations

from typing import Any

import torch

from tests.families import Block, TinyFamily
from tests.families.latents import ask, quiet, tiny_flow, tiny_kl
from tests.families.text import tiny_t5, tiny_words

WIDTH = 16


def build() -> Any:
    import diffusers

    torch.manual_seed(0)
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=2,
        in_channels=4,
        context_in_dim=32,
        hidden_size=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        axes_dim=[4, 4],
    ).eval()
    for parameter in transformer.parameters():  # its last layer and its gates begin at zero
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    pipe = quiet(
        diffusers.PRXPipeline(
            transformer=transformer,
            scheduler=tiny_flow(),
            text_encoder=tiny_t5(32, seed=1),
            tokenizer=tiny_words(model_max_length=16),
            vae=tiny_kl(4),
        )
    )
    for cleaning in ("clean_text", "basic_clean"):  # wants a package of its own
        if hasattr(pipe.text_preprocessor, cleaning):
            setattr(pipe.text_preprocessor, cleaning, lambda text: text)
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
        "use_resolution_binning": False,
        "skip_text_cleaning": True,
        "negative_prompt": ["cat"] * len(prompts),
        **arguments,
    }
    return ask(pipe, prompts, images_per_prompt=images_per_prompt, size=size, steps=steps, seed=seed, **arguments)


FAMILY = TinyFamily(
    name="prx",
    title="PRX",
    pipeline="PRXPipeline",
    build=build,
    call=call,
    blocks=(
        Block("transformer.blocks.0", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.0.attention", "image", WIDTH, (4, 4), (4, 8)),
        Block("transformer.blocks.1", "image", WIDTH, (4, 4), (4, 8)),
    ),
    alone=True,  # it makes the time for two entries
)
