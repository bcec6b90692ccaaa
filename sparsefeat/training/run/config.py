"""How an SAE is trained: optimiser, schedule, precision, what is kept when."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsefeat.arguments import number, whole
from sparsefeat.training.learning.initialise import STARTS
from sparsefeat.training.objective.objectives import Objective

OPTIMIZERS = ("adam", "adamw")
DECAYS = ("linear", "cosine")
PRECISIONS = ("float32", "bfloat16")
EPSILON = 6.25e-10  # of OpenAI's trainer


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimiser steps, of `batch_size` rows each, over all ranks.

    optimizer: "adam", or "adamw" with `weight_decay`. betas: Adam's.
    lr: its peak; None is 2e-4 / sqrt(n_latents / 2^14), the scaling of arXiv 2406.04093. It rises linearly over
        `warmup_steps` and falls to 0 over the last `decay_steps` (None: all after the warm-up; 0: never), linearly or along
        half a cosine as `decay` says.
    grad_clip: largest norm of the whole gradient; None for no bound.
    accumulate: the batch is gone through in so many pieces, each a batch of its own to the loss, whose gradients are averaged:
        for batches that do not fit at once. Each has two rows or more, whose variance
        the error is compared with.
    ema: the SAE that comes out is the exponential average of the weights with this decay (fae has 0.995); None for the last.
    precision: of the loss and its gradients; weights and optimiser are float32 throughout. "bfloat16" is for GPUs.
    objective: what is minimised, under which constraints, and which latents are dead; see `objectives`.
    start: where the directions begin: "random", or "rows" of the data, with which fewer latents die; see `initialise`.
    seed: of the start values and of the order of the rows.
    checkpoint_every, log_every: in steps.

    Raises:
        TypeError: `objective` is no Objective.
        ValueError: an argument that cannot be, by its name; values that contradict each other.
    """

    steps: int
    batch_size: int = 4096
    lr: float | None = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float | None = 1.0
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50
    optimizer: str = "adam"
    weight_decay: float = 0.0
    decay: str = "linear"
    accumulate: int = 1
    ema: float | None = None
    precision: str = "float32"
    start: str = "random"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, 0)
        whole("accumulate", self.accumulate, 1, self.batch_size)
        for name in ("lr", "grad_clip"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0, above=True)
        whole("warmup_steps", self.warmup_steps, 0, self.steps)
        if self.decay_steps is not None:
            whole("decay_steps", self.decay_steps, 0, self.steps)
        if (
            not isinstance(self.betas, Sequence)
            or len(self.betas) != 2
            or not all(0 <= number("betas", beta, 0, 1) < 1 for beta in self.betas)
        ):
            raise ValueError(f"betas is {self.betas!r}: pass two numbers, from 0 to below 1")
        number("weight_decay", self.weight_decay, 0)
        if not isinstance(self.objective, Objective):
            raise TypeError(f"objective is {type(self.objective).__name__}, not an Objective; make one, Objective().")
        for name, choices in (
            ("optimizer", OPTIMIZERS),
            ("decay", DECAYS),
            ("precision", PRECISIONS),
            ("start", STARTS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r:.100} must be one of {', '.join(choices)}.")
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(f"weight_decay={self.weight_decay!r} is adamw's: pass optimizer='adamw', or leave it out.")
        if self.batch_size < 2 * self.accumulate:
            name = "accumulate" if self.accumulate > 1 else "batch_size"
            raise ValueError(
                f"{name}={getattr(self, name)} leaves a piece of a batch one row, without a variance to compare its error with: "
                "give each at least two rows."
            )
        if self.start != "random" and self.objective.decoder == "archetypal":
            raise ValueError(
                f"start={self.start!r} is not for decoder 'archetypal', which begins at centres: leave it out."
            )
        if self.ema is not None and not 0 < number("ema", self.ema, 0, 1) < 1:
            raise ValueError(f"ema={self.ema!r} must be between 0 and 1, such as 0.995, or None.")

    def lr_at(self, step: int, n_latents: int) -> float:
        peak = self.lr if self.lr is not None else 2e-4 / math.sqrt(n_latents / 2**14)
        decay = self.decay_steps if self.decay_steps is not None else self.steps - self.warmup_steps
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, (self.steps - step) / decay) if decay else 1.0
        return peak * rise * (fall if self.decay == "linear" else (1 - math.cos(math.pi * fall)) / 2)

    def make_optimizer(self, trained: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Its learning rate is set before every step."""
        settings = {"lr": 0.0, "betas": self.betas, "eps": EPSILON, "fused": True}
        if self.optimizer == "adamw":
            return torch.optim.AdamW(trained, weight_decay=self.weight_decay, **settings)
        return torch.optim.Adam(trained, **settings)
