"""Cones: the weights of the attention to the text that a concept lives in (Liu et al., ICML 2023, arXiv 2303.05125).

With L the denoiser's own loss on finished latents of the concept, plus lambda times the same on others' (the prior), pass by
pass over the schedule, beginning with M = 0 and the weights theta as they are:

    M <- M + theta dL/dtheta,   theta <- theta (1 - rho theta dL/dtheta)

A weight is a concept neuron where M is above tau: without it the loss is lower. The paper gives no tau; an unofficial
implementation has 7e-3 after 50 passes and more.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.attribution.components import OnLatents, prompts_of
from sparsefeat.attribution.gradients import WeightGradients, denoiser_name, weight_paths
from sparsefeat.attribution.masks import WeightMask
from sparsefeat.pipeline import Context, attach
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call, for_several
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.noising import finished_latents
from sparsefeat.pipeline.step_window import Steps, StepWindow

# Keys and values of the text: of UNets' cross-attention, and of joint attention.
_OF_TEXT = r".*\.(attn2\.to_(k|v)|add_(k|v)_proj)"


class _Passes(OnLatents):
    """One pass a step: what its images' gradients add to M, and the weights a little smaller where they raise the loss."""

    def __init__(self, gradients: WeightGradients, latents: Tensor, seed: int, weights: Sequence[float], rho: float):
        super().__init__(gradients, latents, seed)
        self.weights_of, self.rho = tuple(weights), rho
        self.sums = {path: torch.zeros_like(total) for path, total in gradients.sums.items()}

    def weight(self, image: int) -> float:
        return self.weights_of[image]

    def end_step(self, context: Context) -> None:
        super().end_step(context)
        for path, gradient in self.gradients.checked().items():
            theta = self.gradients.values[path]
            term = theta.float() * gradient
            self.sums[path] += term
            self.gradients.values[path] = (theta.float() * (1 - self.rho * term)).to(theta.dtype)
            gradient.zero_()


def cones(
    pipe: Any,
    concept: str,
    *,
    prior: str | None = None,
    prior_weight: float = 1.0,
    images: int | None = None,
    latents: Tensor | None = None,
    threshold: float = 7e-3,
    rho: float = 2e-5,
    modules: str | Sequence[str] | None = None,
    steps: Steps = None,
    seed: int = 0,
    **call: Any,
) -> WeightMask:
    """A mask of a concept's neurons, which shuts them. Masks of several concepts unite: `.union`.

    Args:
        concept: prompt of the concept's images.
        prior: prompt of images that are to stay as they are, as many; default none. prior_weight: lambda.
        images: how many of each; they are drawn by the pipeline. Default 4, or as many as `latents`.
        latents: finished latents of the concept instead, in the denoiser's layout.
        threshold: tau. What it means depends on the model; where nothing is above it, the error says what the highest is.
        rho: of the shrinking.
        modules: as of `attribute_weights`; default the keys and values of the text.
        steps: when the neurons are shut; default all.
        call: arguments of the pipeline. Its num_inference_steps are the passes (published: 50 to 1000).

    Raises:
        TypeError: an argument that the pipeline's call does not take.
        ValueError: an argument that cannot be, by its name; no weight is above the threshold.
    """
    words = prompts_of("concept", [concept])
    number("threshold", threshold, 0)
    number("rho", rho, 0)
    number("prior_weight", prior_weight, 0)
    n_images = whole("images", images) if images is not None else 4
    whole("seed", seed, 0)
    StepWindow.parse(steps)
    if latents is not None:
        if not isinstance(latents, Tensor) or not len(latents):
            raise ValueError("latents must be a tensor of finished latents of the concept, one or more.")
        if images is not None and images != len(latents):
            raise ValueError(
                f"images={images} is not the {len(latents)} of latents=, which are not drawn; leave it out."
            )
        n_images = len(finite("latents", latents))
    check_call(pipe, call, cones, "output_type", "return_dict", *GIVEN_TO_SEVERAL)
    chosen = modules if modules is not None else _of_text(pipe)
    gradients = WeightGradients(pipe, weight_paths(pipe, chosen))
    words *= n_images
    drawn = finished_latents(pipe, words, seed, **call) if latents is None else latents
    shares = [1 / n_images] * n_images
    if prior is not None:
        others = prompts_of("prior", [prior]) * n_images
        drawn = torch.cat([drawn, finished_latents(pipe, others, seed + 1, **call).to(drawn)])
        words, shares = words + others, shares + [prior_weight / n_images] * n_images
    passes = _Passes(gradients, drawn, seed, shares, rho)
    with attach(pipe, passes):
        pipe(
            words, generator=torch.Generator().manual_seed(seed), output_type="latent", **for_several(call, len(words))
        )
    masks = {path: total > threshold for path, total in passes.sums.items()}
    if not any(bool(mask.any()) for mask in masks.values()):
        highest = max(float(total.max()) for total in passes.sums.values())
        raise ValueError(
            f"threshold={threshold} is above all weights' sums, of which the highest is {highest:.2g}; lower it."
        )
    return WeightMask({path: mask for path, mask in masks.items() if mask.any()}, concept, steps=steps)


def _of_text(pipe: Any) -> list[str]:
    name = denoiser_name(pipe)
    root = components(pipe)[name]
    plain = (path.replace("_orig_mod.", "").replace(".base_layer", "") for path, _ in root.named_modules())
    found = [f"{name}.{path}" for path in dict.fromkeys(plain) if re.fullmatch(_OF_TEXT, path)]
    if not found:
        raise ValueError(
            f"which weights of {name} are keys and values of the text is not known; name them, modules=[...]."
        )
    return found
