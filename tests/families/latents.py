"""The tiny VAE and scheduler that the latent transformers share, and the sizes they are called with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

SIZES = {"square": (32, 32), "wide": (32, 64)}
"""(height, width) in pixels: latents of 8 x 8 and 8 x 16 behind a VAE that shrinks by 4."""


def tiny_kl(channels: int = 16, seed: int = 0, levels: int = 3, **options: Any) -> AutoencoderKL:
    """A VAE that shrinks by 2 to the power of levels - 1."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=32,
        **{"shift_factor": 0.1, "scaling_factor": 1.5, **options},
    ).eval()


def tiny_flow(**options: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**options)


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask(
    pipe: Any, prompts: list[str], *, images_per_prompt: int, size: str, steps: int, seed: int, **arguments: Any
) -> torch.Tensor:
    """Call the pipeline for its final latents, from a fixed seed."""
    height, width = SIZES[size]
    call = {
        "prompt": prompts,
        "height": height,
        "width": width,
        "num_images_per_prompt": images_per_prompt,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipe(**{**call, **arguments}).images


def ask_video(
    pipe: Any,
    prompts: list[str],
    *,
    images_per_prompt: int,
    size: str,
    steps: int,
    seed: int,
    sizes: Mapping[str, tuple[int, int]],
    **arguments: Any,
) -> torch.Tensor:
    """The same for a video: `sizes` are (height, width) in pixels for "square" and "wide"."""
    height, width = sizes[size]
    call = {
        "prompt": prompts,
        "height": height,
        "width": width,
        "num_videos_per_prompt": images_per_prompt,
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return pipe(**{**call, **arguments}).frames
