"""SAeUron (arXiv 2501.18052), written out.

The SAE sees the output x of a cross-attention transformer, every position a row; z = topk(relu(E (x - b) + b_lat)).

    statistics  the mean over positions of z, per prompt and step, of the conditional rows
    mu(t, c)    the mean of the statistics over the prompts of concept c; mu(t, not c) over those of all others
    score       s_i = mu_i(t,c) / (sum_j mu_j(t,c) + 1e-8) - mu_i(t,not c) / (sum_j mu_j(t,not c) + 1e-8)
    selection   F_t = {i : s_i > quantile(s, p / 100)}, strictly, linear interpolation
    threshold   m_i(t) = the mean over all concepts, c among them, of mu_i(t, concept)
    edit        z'_i = gamma mu_i(t,c) z_i where i in F_t and z_i > m_i(t), else z_i
    output      "keep" (the paper's intent): x' = xhat' + (x - xhat) = x + Delta
                "saeuron_released": the code's error is xhat - x, hence x' = 2 xhat - x + Delta, at every position

The edit is applied to both halves of the guidance batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from tests.presets.plain.dense import DenseSAE, decode, relu_then_topk
from tests.presets.plain.sites import at_steps, maps_of, rows_of

Statistics = Mapping[str, torch.Tensor]
"""Of each concept [prompts, steps, n]."""


def statistics(
    pipe: Any,
    path: str,
    sae: DenseSAE,
    prompts: Mapping[str, Sequence[str]],
    generate: Callable[[str], Any],
    dtype: torch.dtype = torch.float64,
) -> dict[str, torch.Tensor]:
    """`generate(prompt)` runs the pipeline with guidance for one prompt and one image. The released files hold
    float16: `dtype=torch.float16`."""
    return {
        concept: torch.stack([_of_prompt(pipe, path, sae, generate, prompt) for prompt in texts]).to(dtype)
        for concept, texts in prompts.items()
    }


def _of_prompt(pipe: Any, path: str, sae: DenseSAE, generate: Callable[[str], Any], prompt: str) -> torch.Tensor:
    means: list[torch.Tensor] = []

    def rule(_came_in: torch.Tensor, output: torch.Tensor, step: int) -> None:
        assert step == len(means)
        _uncond, cond = rows_of(output)
        means.append(relu_then_topk(sae, cond).mean(dim=(0, 1)))

    with at_steps(pipe, path, rule):
        generate(prompt)
    return torch.stack(means)


def mean_of(stats: Statistics, concept: str) -> torch.Tensor:
    """mu(t, c): [steps, n]."""
    return stats[concept].double().mean(dim=0)


def score(stats: Statistics, concept: str) -> torch.Tensor:
    """[steps, n]."""
    others = torch.cat([values.double() for other, values in stats.items() if other != concept]).mean(dim=0)
    mu = mean_of(stats, concept)
    return mu / (mu.sum(dim=1, keepdim=True) + 1e-8) - others / (others.sum(dim=1, keepdim=True) + 1e-8)


def quantile(values: torch.Tensor, p: float) -> float:
    """The linearly interpolated quantile of a vector, for p in 0..100: at the place p/100 (n - 1) of its order."""
    order = torch.sort(values.double()).values
    place = p / 100 * (len(order) - 1)
    below = int(place)
    above = min(below + 1, len(order) - 1)
    return float(order[below] + (place - below) * (order[above] - order[below]))


def select(scores: torch.Tensor, percentile: float) -> torch.Tensor:
    """F_t as a mask [steps, n] of scores [steps, n]."""
    return torch.stack([at_step > quantile(at_step, percentile) for at_step in scores])


def threshold(stats: Statistics) -> torch.Tensor:
    """m: [steps, n]."""
    return torch.stack([mean_of(stats, concept) for concept in stats]).mean(dim=0)


def edited_code(
    z: torch.Tensor, selected: torch.Tensor, mu: torch.Tensor, m: torch.Tensor, gamma: float
) -> torch.Tensor:
    """z' of codes [..., n] at one step; `selected`, `mu` and `m` are [n]."""
    return torch.where(selected & (z > m), z * (gamma * mu), z)


@contextmanager
def erase(
    pipe: Any,
    path: str,
    sae: DenseSAE,
    stats: Statistics,
    concepts: Sequence[str],
    *,
    percentile: float,
    gamma: float,
    error: Literal["keep", "saeuron_released"] = "keep",
) -> Iterator:
    """Erase the concepts, which are keys of `stats`. A latent selected by several concepts is multiplied once, with
    the mean of the last of them (the released code assigns a concatenated index list). The pipeline has to take as
    many steps as the statistics have."""
    m = threshold(stats)
    selected = torch.zeros_like(m, dtype=torch.bool)
    mu = torch.zeros_like(m)
    for concept in concepts:
        chosen = select(score(stats, concept), percentile)
        mu[chosen] = mean_of(stats, concept)[chosen]
        selected |= chosen

    def rule(_came_in: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor:
        x = rows_of(output)
        z = relu_then_topk(sae, x)
        delta = (edited_code(z, selected[step], mu[step], m[step], gamma) - z) @ sae.D.double()
        return maps_of(x + delta if error == "keep" else 2 * decode(sae, z) - x + delta)

    with at_steps(pipe, path, rule):
        yield


@contextmanager
def scale_latent(pipe: Any, path: str, sae: DenseSAE, latent: int, multiplier: float) -> Iterator:
    """The released feature-intervention hook: one latent times `multiplier`, the error dropped (x' = xhat')."""

    def rule(_came_in: torch.Tensor, output: torch.Tensor, _step: int) -> torch.Tensor:
        z = relu_then_topk(sae, rows_of(output))
        z[..., latent] *= multiplier
        return maps_of(decode(sae, z))

    with at_steps(pipe, path, rule):
        yield
