"""Whether units stand for concepts: sparse probing, separability, and names from the captions' words.

`member` is bool `[concepts, images]` throughout: which images have which concept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefeat.arguments import finite, whole
from sparsefeat.features.chance import midranks, name_of

BINS = 16
DEALT, T_95 = 20, 2.093  # random deals, and the 97.5th percentile of Student's t with 19 degrees of freedom
SHUFFLES = 1000  # of the null of a name
NAMED_AT_MOST = 64  # units that are tried, of which a share is reported


def halves(n: int, member: Tensor, seed: int = 0) -> Tensor:
    """bool `[n]`: half of the images of each concept as nearly as can be, the one for choosing, the other for trying."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(n, dtype=torch.bool)
    balance = torch.zeros(len(member), dtype=torch.float64)
    for seen, image in enumerate(torch.randperm(n, generator=generator).tolist()):
        of_image = member[:, image].double()
        # To the half that has had fewer of this image's concepts, or else fewer images.
        lacking = float(of_image @ balance)
        chosen[image] = lacking < 0 or (lacking == 0 and 2 * int(chosen.sum()) <= seen)
        balance += of_image if chosen[image] else -of_image
    return chosen


def sparse_probing(activations: Tensor, member: Tensor, k: int, choosing: Tensor) -> list[float]:
    """For each concept, the area under the curve of a logistic regression on the k units whose means with and without the
    concept lie farthest apart, in deviations; chosen and fitted on the images `choosing`, tried on the others.

    Args:
        activations: `[images, units]`. choosing: bool `[images]`.
    """
    whole("k", k, 1, activations.shape[1])
    activations = finite("activations", activations).double()
    scale = activations[choosing].std(0).clamp_min(1e-12)
    unit = (activations - activations[choosing].mean(0)) / scale
    found = []
    for has in member:
        train, held = unit[choosing], unit[~choosing]
        apart = (train[has[choosing]].mean(0) - train[~has[choosing]].mean(0)).abs()
        best = apart.topk(k).indices
        weight = _logistic(train[:, best], has[choosing])
        found.append(_area(held[:, best] @ weight, has[~choosing]))
    return found


def _logistic(x: Tensor, y: Tensor, ridge: float = 1.0, steps: int = 25) -> Tensor:
    """Weights of a ridge-penalised logistic regression with classes of equal weight, by Newton's method."""
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    each = torch.where(y, 0.5 / y.sum(), 0.5 / (~y).sum()) * len(y)
    w = x.new_zeros(x.shape[1])
    penalty = ridge * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0
    for _ in range(steps):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (each * (p - y.double())) + penalty @ w
        curvature = (x * (each * p * (1 - p))[:, None]).T @ x + penalty
        curvature += 1e-9 * torch.eye(len(w), dtype=x.dtype)
        w = w - torch.linalg.solve(curvature, gradient)
    return w[:-1]


def _area(score: Tensor, has: Tensor) -> float:
    n_with, n_without = int(has.sum()), int((~has).sum())
    ranks = midranks(score[None])[0]
    return float((ranks[has].sum() - n_with * (n_with + 1) / 2) / (n_with * n_without))


def separability(activations: Tensor, member: Tensor) -> Tensor:
    """fp64 `[units]`: the Jensen-Shannon distance between the activations of the images of two concepts, mean over the pairs
    of concepts (arXiv 2508.15094 has the idea; its code is not public, and the definition is this one).

    Densities are histograms over the same bins for all concepts: one for exactly 0, and up to the unit's largest so many of
    equal width as the square root of the images a concept has (of the smallest; at most BINS): with more bins than that any
    two concepts lie far apart, and nothing is left to tell. Distances are square roots of divergences in bits: 0 where two concepts have the same activations, 1 where
    they have no bin in common.

    Args:
        activations: `[images, units]`, none negative.
    """
    activations = finite("activations", activations).double()
    top = activations.amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    bins = max(1, min(BINS, math.isqrt(int(member.sum(1).min()))))
    place = torch.where(activations > 0, 1 + (activations / top * bins).long().clamp(max=bins - 1), 0)
    one_hot = torch.nn.functional.one_hot(place, bins + 1).double()  # [images, units, bins]
    share = torch.einsum("ci,iub->cub", member.double(), one_hot) / member.sum(1).double().view(-1, 1, 1)
    total, pairs = torch.zeros(activations.shape[1], dtype=torch.float64), 0
    for first in range(len(member)):
        for second in range(first + 1, len(member)):
            middle = (share[first] + share[second]) / 2
            divergence = _entropy(middle) - (_entropy(share[first]) + _entropy(share[second])) / 2
            total += divergence.clamp(0, 1).sqrt()
            pairs += 1
    return total / pairs


class AboveChance(NamedTuple):
    """value: the mean over units, less what chance gives. interval: chance alone comes no farther from 0 in 19 of 20 deals;
    it is wide where concepts have few images."""

    value: float
    interval: float


def separability_above_chance(activations: Tensor, member: Tensor, seed: int = 0) -> AboveChance:
    """`separability`, mean over units, less that of the same activations dealt out to the images at random, the mean over
    `DEALT` deals: with few images a concept, histograms of anything are far apart."""
    generator = torch.Generator().manual_seed(seed)
    deals = [activations[torch.randperm(len(activations), generator=generator)] for _ in range(DEALT)]
    chance = torch.stack([separability(deal, member).mean() for deal in deals])
    # One more deal's distance from the mean of these, by Student's t.
    interval = T_95 * float(chance.std()) * math.sqrt(1 + 1 / DEALT)
    return AboveChance(float(separability(activations, member).mean() - chance.mean()), interval)


def _entropy(share: Tensor) -> Tensor:
    """Bits, along the last dimension."""
    return -(share * share.clamp_min(torch.finfo(share.dtype).tiny).log2()).sum(-1)


class Names(NamedTuple):
    """share: of the units tried, those whose word is no chance and tells three pairs of four apart. auc: the mean area under
    the curve of every unit's best word on images that had no part in the choice. tried: how many units, all of those that
    fire or a random part."""

    share: float
    auc: float
    tried: int


def names(
    peaks: Tensor, concepts: Sequence[Sequence[str]], words: Sequence[str], choosing: Tensor, seed: int = 0
) -> Names:
    """How many units a caption's word names (`sparsefeat.features.chance`); peaks: `[images, units]`."""
    alive = (peaks > 0).any(0).nonzero().flatten()
    order = torch.randperm(len(alive), generator=torch.Generator().manual_seed(seed))[:NAMED_AT_MOST]
    found = [
        name_of(peaks[:, unit], concepts, words, choosing, seed=seed, shuffles=SHUFFLES)
        for unit in alive[order].tolist()
    ]
    if not found:
        return Names(0.0, 0.5, 0)
    return Names(
        sum(one.is_a_name for one in found) / len(found), sum(one.auc for one in found) / len(found), len(found)
    )
