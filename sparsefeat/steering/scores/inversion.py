"""The way back: an image's latents at every noise level, by DDIM run backwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, whole
from sparsefeat.pipeline.call_arguments import check_call, check_pipeline
from sparsefeat.steering.scores.levels import predicts

# What the call is given here beside the prompt: the image, the steps, and no guidance.
GIVEN_HERE = ("latents", "num_inference_steps", "guidance_scale", "output_type", "callback_on_step_end")


@dataclass(frozen=True)
class Inversion:
    """`latents` [steps, images, channels, height, width]: those from which step i of a run of as many steps begins.

    Raises:
        ValueError: `latents` is no tensor of five dimensions, or not finite.
    """

    latents: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.latents, Tensor) or self.latents.ndim != 5:
            raise ValueError(
                "latents must be a tensor [steps, images, channels, height, width]; Inversion.of makes it."
            )
        finite("latents", self.latents)

    @property
    def start(self) -> Tensor:
        """The latents to call the pipeline with: `pipe("", latents=inversion.start, num_inference_steps=steps)`."""
        return self.latents[0]

    def at(self, step: int, n_steps: int, like: Tensor) -> Tensor:
        """Those of one step, of the shape and dtype of the latents there.

        Raises:
            ValueError: the call has other steps, or latents of another shape.
        """
        if n_steps != len(self.latents) or self.latents.shape[1:] != like.shape:
            raise ValueError(
                f"the inversion has {len(self.latents)} steps of {list(self.latents.shape[1:])} and this call {n_steps} of "
                f"{list(like.shape)}; call with the steps and the image that were inverted."
            )
        return self.latents[step].to(like)

    @classmethod
    @torch.no_grad()
    def of(cls, pipe: Any, image: Any, prompt: str, steps: int = 50, **call: Any) -> Inversion:
        """Invert a PIL image with its prompt, without guidance.

        Args:
            pipe: Stable Diffusion or SDXL, whose scheduler predicts noise or v; run it afterwards with a DDIMScheduler.
            call: further arguments of the pipeline's call.

        Raises:
            TypeError: `pipe` is no pipeline, or `image` no image.
            ValueError: a pipeline or scheduler that DDIM does not invert; an argument that cannot be, by its name.
        """
        import diffusers  # takes seconds, and whoever has a pipeline has it already

        whole("steps", steps)
        check_pipeline(pipe)
        check_call(pipe, call, cls.of, *GIVEN_HERE)
        if image is None or isinstance(image, (str, bytes, int, os.PathLike)):
            raise TypeError(f"image is {type(image).__name__}, not an image; open one, PIL.Image.open(path).")
        if getattr(pipe, "unet", None) is None or predicts(pipe.scheduler) not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"{type(pipe).__name__} with a {type(pipe.scheduler).__name__} is not inverted by DDIM; take a pipeline with a "
                "UNet that predicts noise or v (Stable Diffusion, SDXL)."
            )
        pixels = pipe.image_processor.preprocess(image).to(pipe.device, pipe.vae.dtype)
        encoded = pipe.vae.encode(pixels)
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        latents = (latents - (getattr(pipe.vae.config, "shift_factor", None) or 0)) * pipe.vae.config.scaling_factor
        backwards = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config, clip_sample=False)
        twin = type(pipe)(**{**pipe.components, "scheduler": backwards})
        twin.set_progress_bar_config(disable=True)
        kept: list[Tensor] = []

        def keep(running: Any, step: int, timestep: Any, state: dict[str, Any]) -> dict[str, Any]:
            kept.append(state["latents"].detach().clone())
            return state

        height, width = pixels.shape[-2:]
        settings = {"height": height, "width": width, "num_inference_steps": steps, "guidance_scale": 1.0}
        twin(prompt, latents=latents, output_type="latent", callback_on_step_end=keep, **{**settings, **call})
        return cls(torch.stack(kept[::-1]).float())
