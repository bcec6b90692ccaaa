"""The diffusion classifier: which of some prompts a picture is of, asked of the pipeline itself (arXiv 2303.16203).

    p(c | x) ~ exp(-E |aim - f(x_t, t, c)|^2)

x_t: the picture's latents, noised; f: what the denoiser says under prompt c; aim: what it was to say. The same noise levels and noises
for all prompts. An evaluator that needs no other model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.features.prompts import encode_alone
from sparsefeat.pipeline.noising import noised

BATCH = 50
"""Prompts of one run of the denoiser."""


def encoded(pipe: Any, images: Tensor) -> Tensor:
    """The latents [n, channels, height, width] of images [n, 3, height, width] in 0 to 1, as the denoiser is given them."""
    found = pipe.vae.encode((images * 2 - 1).to(pipe.vae.dtype))
    latents = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
    shift = getattr(pipe.vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * pipe.vae.config.scaling_factor


@torch.no_grad()
def diffusion_classifier(
    pipe: Any, images: Tensor, prompts: Sequence[str], *, n_levels: int = 8, n_steps: int = 50, seed: int = 0
) -> Tensor:
    """fp64 [images, prompts]: E |aim - f|^2, the lower the likelier. `(-errors).softmax(1)` is p(c | x) where all prompts are
    as likely.

    Args:
        pipe: of Stable Diffusion's kind, a UNet that is given the text alone.
        images: [n, 3, height, width] in 0 to 1.
        n_levels: noise levels, evenly over the middle of a schedule of `n_steps`, a noise each.
        seed: of the noises, one a level for all images and prompts.

    Raises:
        ValueError: another kind of pipeline.
    """
    whole("n_levels", n_levels, 1, n_steps)
    if getattr(pipe, "unet", None) is None or getattr(pipe, "text_encoder_2", None) is not None:
        raise ValueError(
            f"{type(pipe).__name__} has no unet that is given the text alone; use a pipeline of Stable Diffusion 1 or 2."
        )
    latents = encoded(pipe, images)
    text = encode_alone(pipe, {"prompt": list(prompts)}, {}, device=latents.device)[0]
    pipe.scheduler.set_timesteps(n_steps)
    middle = torch.linspace(0.15, 0.85, n_levels) * (n_steps - 1)
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(len(images), len(prompts), dtype=torch.float64)
    for at in middle.round().long().tolist():
        timestep = pipe.scheduler.timesteps[at : at + 1]
        noise = torch.randn(latents[:1].shape, generator=generator, dtype=torch.float32).to(latents)
        for i, one in enumerate(latents):
            seen, aim = noised(pipe.scheduler, one[None], noise, timestep)
            for part in torch.arange(len(prompts)).split(BATCH):
                said = pipe.unet(
                    seen.expand(len(part), -1, -1, -1), timestep, encoder_hidden_states=text[part], return_dict=False
                )[0]
                errors[i, part] += (said[:, : aim.shape[1]] - aim).double().square().flatten(1).sum(1)
    return errors / n_levels
