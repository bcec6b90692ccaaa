"""Noise as the model was trained on: of finished latents, of a given strength, and what the denoiser should say of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.pipeline.call_arguments import for_several

LATENTS = ("sample", "hidden_states", "x")
"""What denoisers call the latents that they are given."""


def finished_latents(pipe: Any, prompts: Sequence[str], seed: int, **call: Any) -> Tensor:
    """What the pipeline draws, before it is decoded, in the layout in which its denoiser takes it."""
    several = for_several(call, len(prompts))
    output = pipe(list(prompts), generator=torch.Generator().manual_seed(seed), output_type="latent", **several)
    drawn = getattr(output, "images", None)
    if not isinstance(drawn, Tensor):
        raise ValueError("the pipeline gives no latents with output_type='latent': this loss cannot be measured on it")
    return drawn


def noised(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """What the denoiser sees at that time, and what it should say."""
    if hasattr(scheduler, "scale_noise"):  # flow matching: velocity
        return scheduler.scale_noise(latents, timestep, noise), noise - latents
    predicts = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    if not hasattr(scheduler, "add_noise") or predicts not in ("epsilon", "sample", "v_prediction"):
        raise ValueError(
            f"{type(scheduler).__name__} does not say how noise is added, or predicts {predicts!r}: exchange it for a "
            "scheduler of diffusers that does, such as DDIMScheduler"
        )
    noised = scheduler.add_noise(latents, noise, timestep)
    # Schedulers that count their own steps scale by where they are, which is here.
    seen = scheduler.scale_model_input(noised, timestep[0]) if hasattr(scheduler, "scale_model_input") else noised
    if predicts == "epsilon":
        return seen, noise
    return seen, latents if predicts == "sample" else scheduler.get_velocity(latents, noise, timestep)
