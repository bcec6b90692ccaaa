"""Clamp: a concept's latents held down to what they are on other concepts' prompts."""

from __future__ import annotations

from typing import Any

from sparsefeat.arguments import number, whole
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.features.scores import normalized_mean_difference
from sparsefeat.features.statistics import Statistics, check_statistics
from sparsefeat.sae import SAE
from sparsefeat.steering.steer import Steer


def clamp_latents(
    sae: SAE, statistics: Statistics, concept: str, *, n_latents: int = 32, factor: float = 1.0, **options: Any
) -> Steer:
    """z' = min(z, factor m_i), with m_i the mean of latent i where it is active on the other concepts' prompts.

    Args:
        concept: a concept of the statistics, which need another; its latents are those of SAeUron's score over all timesteps.
        n_latents: the n highest scores above 0.
        factor: 0 takes the latents out.
        options: condition, steps, mask, at of `Steer`; condition is "both" by default.

    Raises:
        TypeError: `sae` or `statistics` is no such thing.
        ValueError: the statistics are of another SAE, have no such concept or no other; no latent is more active with it.
    """
    hookpoint_of(sae, options.get("at"))
    check_statistics(statistics, sae)
    number("factor", factor, 0)
    whole("n_latents", n_latents, 1, sae.n_latents)
    others = statistics.others(concept)
    if not others:
        raise ValueError(f"concept={concept!r} is the only one of the statistics; collect prompts without it too.")
    scores = normalized_mean_difference(statistics.mean(concept), statistics.mean(others))
    order = scores.argsort(descending=True, stable=True)[:n_latents]
    latents = order[scores[order] > 0].tolist()
    if not latents:
        raise ValueError(f"no latent is more active with {concept!r} than without; collect prompts that differ.")
    high = factor * statistics.mean_active(others)
    return Steer(sae, clamp={i: (None, float(high[i])) for i in latents}, **{"condition": "both", **options})
