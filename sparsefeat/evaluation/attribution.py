"""How well gradients rank latents: against ablation, which is what they guess."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsefeat.attribution import attribute_latents
from sparsefeat.sae import SAE


@dataclass(frozen=True)
class RankCorrelations:
    """Spearman's, of two guesses with ablation, over the same latents."""

    prompt: str
    n_latents: int
    gradient: float
    integrated: float


def rank_correlations(
    pipe: Any, sae: SAE, prompts: Sequence[str], *, n_latents: int = 40, seed: int = 0, **call: Any
) -> Iterator[RankCorrelations]:
    """For each prompt, over half as many latents of the largest gradient score as others that fired, drawn by `seed`: on the
    strongest alone every method looks good, on random ones none does.
    """
    for prompt in prompts:
        gradient = attribute_latents(pipe, sae, prompt, seed=seed, **call)
        order = gradient.latents[gradient.scores.abs().argsort(descending=True)]
        rest = order[n_latents // 2 :]
        drawn = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))][: n_latents // 2]
        chosen = torch.cat([order[: n_latents // 2], drawn]).tolist()
        ablated = attribute_latents(pipe, sae, prompt, method="ablation", latents=chosen, seed=seed, **call)
        integrated = attribute_latents(pipe, sae, prompt, method="integrated", seed=seed, **call)
        yield RankCorrelations(
            prompt, len(chosen), gradient.rank_correlation(ablated), integrated.rank_correlation(ablated)
        )
