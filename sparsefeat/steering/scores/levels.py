"""How strong the noise is at a step, and the noise in what a model predicts: x = alpha x0 + sigma eps.

| the model predicts | eps of its prediction p at x |
|---|---|
| noise (epsilon) | p |
| v_prediction, v = alpha eps - sigma x0 | alpha p + sigma x |
| sample | (x - alpha p) / sigma |
| flow, v = eps - x0, alpha = 1 - sigma | x + alpha p |

x is what the denoiser is given: schedulers that hold latents on another scale (Euler's) bring them to this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevel:
    alpha: float
    sigma: float
    predicts: str
    """ "epsilon", "v_prediction", "sample" or "flow"."""

    def noise(self, x: Tensor, predicted: Tensor) -> Tensor:
        """eps, of the latents and the prediction at them."""
        if self.predicts == "epsilon":
            return predicted
        if self.predicts == "v_prediction":
            return self.alpha * predicted + self.sigma * x
        if self.predicts == "sample":
            return (x - self.alpha * predicted) / self.sigma
        return x + self.alpha * predicted

    def clean(self, x: Tensor, predicted: Tensor) -> Tensor:
        """The latents without noise, of the latents and the prediction at them."""
        return predicted if self.predicts == "sample" else (x - self.sigma * self.noise(x, predicted)) / self.alpha

    def noised(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What a model would be given of these."""
        return self.alpha * clean + self.sigma * noise

    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What it should predict."""
        if self.predicts == "v_prediction":
            return self.alpha * noise - self.sigma * clean
        return {"epsilon": noise, "sample": clean}.get(self.predicts, noise - clean)

    def change_of_prediction(self, noise: Tensor) -> Tensor:
        """By how much the prediction changes where eps changes by this, at the same latents.

        Raises ValueError where the latents are all noise and the model predicts something else: nothing follows there.
        """
        if self.predicts == "epsilon":
            return noise
        if self.alpha < 1e-3:
            raise ValueError(
                f"at pure noise (alpha = {self.alpha:.1g}) a change of the noise says nothing of what the model predicts, "
                f"{self.predicts}; leave the first steps out with steps=, or use a model that predicts noise."
            )
        return noise * ((-self.sigma if self.predicts == "sample" else 1.0) / self.alpha)


def predicts(scheduler: Any) -> str | None:
    """What the scheduler takes the model's output for; None where it does not say."""
    config = getattr(scheduler, "config", {})
    said = config.get("prediction_type") if hasattr(config, "get") else None
    if "FlowMatch" in type(scheduler).__name__ or said == "flow_prediction" or (said and config.get("use_flow_sigmas")):
        return "flow"
    return said if said in ("epsilon", "v_prediction", "sample") else None


def noise_level(scheduler: Any, timestep: float, who: str) -> NoiseLevel:
    """At the scheduler's own timestep (0 to the number of training steps).

    Raises ValueError where the scheduler tells neither what is predicted nor how strong the noise is.
    """
    kind = predicts(scheduler)
    if kind == "flow":
        sigma = timestep / scheduler.config.num_train_timesteps
        return NoiseLevel(1 - sigma, sigma, kind)
    kept = getattr(scheduler, "alphas_cumprod", None)
    if kind is None or not isinstance(kept, Tensor):
        raise ValueError(
            f"{type(scheduler).__name__} does not say how strong the noise is at a step or what the model predicts, which "
            f"{who} needs; use a scheduler with alphas_cumprod (DDIM, Euler, DPM-Solver++) or of flow matching."
        )
    kept = kept.double().cpu()
    below = min(max(math.floor(timestep), 0), len(kept) - 1)
    above = min(below + 1, len(kept) - 1)
    # Between two timesteps the logarithm of sigma / alpha is straight, as where schedulers take fractional ones.
    ratios = torch.log((1 - kept[[below, above]]) / kept[[below, above]].clamp_min(1e-12)) / 2
    ratio = float(torch.lerp(ratios[0], ratios[1], timestep - below)) if timestep > below else float(ratios[0])
    alpha = 1 / math.sqrt(1 + math.exp(2 * ratio))
    return NoiseLevel(alpha, math.sqrt(1 - alpha * alpha), kind)
