"""Early warnings: what will not train well is said when it can first be seen, in one sentence with what to do."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsefeat.sae import SAEConfig
from sparsefeat.training.run.config import TrainConfig

# A channel with this share of the variance is all that an SAE without a normaliser learns for long: FLUX's have one.
LARGEST_SHARE = 0.3
# Norms of a sample's longest and shortest twentieth; rows that differ more than this are of several scales.
NORM_RATIO = 30.0
# Of a covariance that is fitted to fewer rows than this a channel, the last components are noise.
ROWS_A_CHANNEL = 4
# Rows after which a latent that all are equally likely to choose has fired a hundred times.
FIRINGS = 100
SILENT_SHARE = 0.5
# Of the number of active latents that a penalty was to reach, in the last batch.
FAR_FROM_TARGET = 0.2


def misfit(rows: Tensor, config: SAEConfig) -> str | None:
    """Why the SAE's normaliser does not fit these rows `[rows, d_model]`, None if nothing speaks against it."""
    place, rows = config.hookpoint or "these rows", rows.float().reshape(-1, config.d_model)
    if config.normalizer == "pca" and len(rows) < ROWS_A_CHANNEL * config.d_model:
        return (
            f"normalizer 'pca' of {place} is fitted to {len(rows):,} rows of {config.d_model} channels: collect "
            f"{ROWS_A_CHANNEL * config.d_model:,}, or take 'affine'"
        )
    if config.normalizer not in ("none", "b_pre"):
        return None
    variance = rows.var(0, correction=0)
    share = float(variance.max() / variance.sum().clamp_min(torch.finfo(variance.dtype).tiny))
    if config.d_model >= 8 and share > LARGEST_SHARE:
        return (
            f"channel {int(variance.argmax())} has {share:.0%} of the variance of {place}, and the loss with normalizer "
            f"{config.normalizer!r} is nearly of it alone: take 'affine' or 'pca'"
        )
    norms = torch.linalg.vector_norm(rows - rows.mean(0), dim=1)
    low, high = (float(norms.quantile(q)) for q in (0.05, 0.95))
    if high > NORM_RATIO * low > 0:
        return (
            f"the rows of {place} differ {high / low:.0f}-fold in norm, and the loss with normalizer {config.normalizer!r} is "
            "of the longest alone: take 'unit_norm' or 'standardize'"
        )
    return None


class EarlyWarnings:
    """Looks at what is measured, and warns of each kind of trouble once. `place` is how the SAE is called."""

    def __init__(self, place: str) -> None:
        self.place = place
        self._said: set[str] = set()

    def look(self, measured: Mapping[str, float], rows_since_fired: Tensor, config: TrainConfig) -> None:
        step = int(measured["step"])
        rows, n_latents = step * config.batch_size, rows_since_fired.shape[0]
        expected = FIRINGS * n_latents / max(measured["l0"], 1e-9)
        if rows >= expected:
            silent = float((rows_since_fired >= expected).float().mean())
            if silent > SILENT_SHARE:
                self._say(
                    "dead",
                    f"{silent:.0%} of the latents at {self.place} did not fire for {int(expected):,} rows, at step {step}: take "
                    "fewer latents, another normalizer, start 'rows', or a larger auxk",
                )
        if step >= max(config.steps // 10, config.warmup_steps) and measured["fvu"] > 1:
            self._say(
                "fvu",
                f"the SAE at {self.place} explains less than the mean does, fvu {measured['fvu']:.2f} at step {step}: lower "
                f"lr={measured['lr']:g}, or take another normalizer",
            )

        target = config.objective.l0_target
        if step == config.steps and target is not None and abs(measured["l0"] / target - 1) > FAR_FROM_TARGET:
            more = "more steps" if measured["l0"] > target else "a smaller sparsity"
            self._say(
                "l0",
                f"the SAE at {self.place} has {measured['l0']:.1f} latents active a row, not the {target:g} it was trained to: take "
                f"{more}",
            )

    def _say(self, kind: str, sentence: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(sentence, stacklevel=4)
