"""Safe Latent Diffusion, as a baseline: guidance away from a concept, with the published settings."""

from __future__ import annotations

from typing import Any

from sparsefeat.pipeline.step_window import Steps
from sparsefeat.steering.scores import SafeGuidance, ScoreEdit

SETTINGS: dict[str, dict[str, Any]] = {
    "weak": {"warmup": 15, "scale": 20.0, "threshold": 0.0, "momentum": 0.0, "beta": 0.0},
    "medium": {"warmup": 10, "scale": 1000.0, "threshold": 0.01, "momentum": 0.3, "beta": 0.4},
    "strong": {"warmup": 7, "scale": 2000.0, "threshold": 0.025, "momentum": 0.5, "beta": 0.7},
    "max": {"warmup": 0, "scale": 5000.0, "threshold": 1.0, "momentum": 0.5, "beta": 0.7},
}


def safe_latent_diffusion(concept: str, setting: str = "medium", *, steps: Steps = None, **options: Any) -> ScoreEdit:
    """The instrument of SLD (arXiv 2211.05105); see `SafeGuidance` for the formula.

    Args:
        concept: what is to be kept away, in words.
        setting: "weak", "medium", "strong" or "max", the published ones, made for 50 steps: `warmup` counts steps.
        steps: window of steps as in `Steer`. options: of `SafeGuidance`, in the place of the setting's.

    Raises:
        ValueError: a setting that there is not; as `SafeGuidance`.
    """
    if setting not in SETTINGS:
        raise ValueError(f"setting={setting!r} is not known; use one of {', '.join(map(repr, SETTINGS))}.")
    return ScoreEdit(SafeGuidance(concept, **{**SETTINGS[setting], **options}), steps=steps)
