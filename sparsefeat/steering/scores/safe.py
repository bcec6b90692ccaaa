"""SLD: guidance away from a concept where the prompt goes towards it (Schramowski et al., CVPR 2023, arXiv 2211.05105).

With eps(c) the prediction for the prompt, eps(S) for the concept, eps() the unconditional one, and nu a momentum that begins at 0:

    mu     = min(1, |s_S (eps(c) - eps(S))|)   where eps(c) - eps(S) < lambda, else 0       element by element
    gamma  = mu (eps(S) - eps()) + s_m nu
    nu     <- beta nu + (1 - beta) gamma                                                   also in the warm-up
    eps'   = eps() + g (eps(c) - eps() - gamma)                                            from step `warmup` on

The published formula has max(1, .) for mu, and the released code, as here, the minimum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsefeat.arguments import number, whole
from sparsefeat.steering.scores.predictions import Predictions
from sparsefeat.steering.scores.rules import Rule


@dataclass(frozen=True)
class SafeGuidance(Rule):
    """SLD's rule for `ScoreEdit`; the defaults are its "medium" setting.

    Args:
        concept: S, one text for everything that is to be kept away.
        scale: s_S. threshold: lambda. momentum: s_m. beta: of the momentum, 0 to 1.
        warmup: steps in which nothing is changed; of 50 in the paper.
    """

    concept: str
    scale: float = 1000.0
    threshold: float = 0.01
    warmup: int = 10
    momentum: float = 0.3
    beta: float = 0.4
    _kept: dict[int, tuple[int, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Image -> the evaluation's step and nu after it."""

    def __post_init__(self) -> None:
        if not isinstance(self.concept, str) or not self.concept.strip():
            raise ValueError(f"concept={self.concept!r} must be a text, as 'violence, blood'.")
        for name in ("scale", "momentum"):
            object.__setattr__(self, name, number(name, getattr(self, name), 0))
        object.__setattr__(self, "threshold", number("threshold", self.threshold))
        object.__setattr__(self, "beta", number("beta", self.beta, 0, 1))
        whole("warmup", self.warmup, 0)

    def prompts(self) -> list[str]:
        return [self.concept]

    def is_nothing(self) -> bool:
        return self.scale == 0

    def remedy(self) -> str:
        return f"look at warmup={self.warmup}, the steps in which it changes nothing, at threshold= and at mask="

    def change(self, at: Predictions) -> Tensor:
        without, unsafe = at.without(), at.of(self.concept)
        # eps is where the formula lives; of other kinds of prediction it is a multiple of theirs, apart from a constant.
        towards = at.level.noise(at.latents, at.own) - at.level.noise(at.latents, unsafe)
        mu = torch.where(towards < self.threshold, (self.scale * towards).abs().clamp(max=1), 0)
        away = mu * (unsafe - without)
        in_noise = mu * (at.level.noise(at.latents, unsafe) - at.level.noise(at.latents, without))
        before = torch.stack(
            [self._before(image, at.step, own) for image, own in zip(at.images, in_noise, strict=True)]
        )
        gamma = in_noise + self.momentum * before
        for image, nu in zip(at.images, self.beta * before + (1 - self.beta) * gamma, strict=True):
            self._kept[image] = at.step, nu
        if at.step < self.warmup:
            return torch.zeros_like(at.own)
        if bool(before.any()):
            away = away + at.level.change_of_prediction(self.momentum * before)
        return -away

    def _before(self, image: int, step: int, like: Tensor) -> Tensor:
        """nu of the step before, 0 where a schedule begins."""
        last, nu = self._kept.get(image, (step, like))
        return nu if last < step and nu.shape == like.shape else torch.zeros_like(like)
