"""The control of an erasure: as many latents drawn at random, edited as strongly."""

from __future__ import annotations

import torch

from sparsefeat.erasure.saeuron import Erase, Selection
from sparsefeat.features.statistics import Statistics


def random_latents(erase: Erase, seed: int, statistics: Statistics | None = None) -> Erase:
    """An `Erase` with the factors of `erase` on other latents, at every timestep as many as there.

    An erasure that removes its concept no better than this one does owes it to the disturbance, not to the latents.

    Args:
        erase: the erasure to control for. None of its latents is drawn.
        seed: of the draw; one set of latents is drawn for the whole schedule, so that a latent that `erase` edits at
            several timesteps has one counterpart throughout.
        statistics: draw among the latents that fire on the erased concepts' prompts, and give each the threshold
            m_i(t) that SAeUron would. Without, draw among all latents, most of which may never fire, and keep the
            thresholds of the originals.
    """
    originals = torch.cat([selection.latents for selection in erase.selections.values()]).unique()
    allowed = torch.ones(erase.sae.n_latents, dtype=torch.bool)
    if statistics is not None:
        allowed = statistics.count(erase.concepts) > 0
    allowed[originals] = False
    candidates = allowed.nonzero()[:, 0]
    if len(candidates) < len(originals):
        raise ValueError(
            f"there are {len(candidates)} latents to draw from and {len(originals)} to replace; erase fewer latents"
            + ("." if statistics is None else ", or leave statistics= out to draw among all.")
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = candidates[torch.randperm(len(candidates), generator=generator)[: len(originals)]]
    counterpart = dict(zip(originals.tolist(), drawn.tolist(), strict=True))
    selections = {}
    for timestep, selection in erase.selections.items():
        latents = torch.tensor([counterpart[i] for i in selection.latents.tolist()], dtype=torch.int64)
        threshold = selection.threshold
        if statistics is not None:
            nearest = statistics.nearest(timestep)
            threshold = torch.stack([statistics.mean(c, nearest)[latents] for c in statistics.concepts]).mean(0).float()
        selections[timestep] = Selection(latents, selection.factor, threshold)
    return erase.with_selections(selections, [f"random instead of {c}" for c in erase.concepts])
