"""What is learned on a frozen model shares this: drawn latents, what the denoiser is given at each step, and its own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.attention.moved_latents import latents_argument, rows_of_arguments
from sparsefeat.pipeline import Call, Context, Instrument
from sparsefeat.steering.scores.levels import NoiseLevel, noise_level


@torch.no_grad()
def drawn(pipe: Any, prompts: Sequence[str], seed: int, call: Mapping[str, Any]) -> Tensor:
    """The finished latents of each prompt, image i from the noise of seed + i."""
    images = [
        pipe(prompt, generator=torch.Generator().manual_seed(seed + i), output_type="latent", **call).images
        for i, prompt in enumerate(prompts)
    ]
    return torch.cat(images)


def without_guidance(pipe: Any, call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call without classifier-free guidance; a distilled one is an input of the model, and stays."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    return dict(call) if config.get("guidance_embeds") else {**call, "guidance_scale": 1.0}


class Given(Instrument):
    """Keeps what the denoiser `name` is given at every step of a call without guidance, and the steps' timesteps."""

    condition = "cond"

    def __init__(self, name: str):
        self.name = name
        self.given: list[dict[str, Any]] = []
        self.times: list[float] = []

    def components(self, pipe: Any) -> tuple[str, ...]:
        return (self.name,)

    def begin_call(self, call: Call) -> None:
        self._call = call

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        scheduled = self._call.timesteps
        if scheduled is None or context.evaluation is None:
            raise ValueError(f"{name} is no denoiser that runs in steps; name a block of the unet or transformer.")
        if "uncond" not in context.condition:
            self.given.append(dict(arguments))
            self.times.append(scheduled[context.evaluation])

    def levels(self, pipe: Any, who: str) -> list[NoiseLevel]:
        return [noise_level(pipe.scheduler, time, who) for time in self.times]


def said_of(root: Any, arguments: Mapping[str, Any], rows: Sequence[int], x: Tensor, **changed: Tensor) -> Tensor:
    """What the denoiser says of the latents x, in float32, with the other arguments of these rows of a run."""
    name = latents_argument(arguments)
    given = rows_of_arguments(arguments, list(rows), len(arguments[name]))
    output = root(**{**given, **changed, name: x.to(arguments[name])})
    said = output if isinstance(output, Tensor) else output[0]
    return (
        said[:, : x.shape[1]] if said.ndim > 3 else said
    ).float()  # beside it, a variance that some were trained to say


def denoising_loss(
    root: Any, arguments: Mapping[str, Any], level: NoiseLevel, clean: Tensor, noise: Tensor, **changed: Tensor
) -> Tensor:
    """The mean squared distance of what the denoiser says of noised latents from what it was trained to say, in float32.

    arguments: of a run for one image. changed: arguments in the place of these, for as many images as `clean`.
    """
    said = said_of(root, arguments, [0] * len(clean), level.noised(clean, noise), **changed)
    return (said - level.target(clean, noise).float()).square().mean()
