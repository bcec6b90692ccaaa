"""Losses on heat maps, and how they get the maps ready: what Attend-and-Excite and A-STAR minimise.

Maps are [words, h, w] or [..., h, w], probabilities averaged over heads and layers; everything is differentiable.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """How much two maps [..., h, w] lie in the same places, from 0 to 1/2: sum min(a, b) / sum (a + b).

    0 where no position has both, 1/2 where the maps are equal; of two masks half of the F1 score (Dice). 0 for two maps of
    zeros. The overlap of A-STAR's two losses, and the measure of how well T2I-Zero keeps words apart.
    """
    both = torch.minimum(a, b).sum((-2, -1))
    whole = (a + b).sum((-2, -1))
    return torch.where(whole > 0, both / torch.where(whole > 0, whole, 1), 0)


def mean_overlap(maps: Tensor) -> Tensor:
    """The mean `overlap` of all pairs of maps [words, h, w]; a metric of a picture's words.

    Raises:
        ValueError: there are fewer than two maps.
    """
    pairs = list(itertools.combinations(range(len(maps)), 2))
    if not pairs:
        raise ValueError(f"maps has shape {list(maps.shape)}; an overlap needs two maps at least")
    return torch.stack([overlap(maps[i], maps[j]) for i, j in pairs]).mean()


def sharpened(maps: Tensor, words: Sequence[Sequence[int]], marked: bool = True, ended: bool = True) -> Tensor:
    """The maps that guidance works on: [words, h, w] of the maps of all tokens [tokens, h, w].

    A softmax over the tokens of 100 times the maps, the first (where it is `marked`, a start) and the last (where the prompt
    is `ended` by an end or padding) left out; of each word the mean over its tokens; then `smoothed`. As Attend-and-Excite has it, where a word is one token.
    """
    first, stop = int(marked), len(maps) - int(ended)
    outside = [token for of_word in words for token in of_word if not first <= token < stop]
    if outside or not all(words):
        raise ValueError(
            f"tokens {outside or [list(of_word) for of_word in words]} cannot be guided by; name tokens from {first} to "
            f"{stop - 1}, without the start and the end"
        )
    shares = (100 * maps[first:stop]).softmax(0)
    return smoothed(torch.stack([shares[[token - first for token in of_word]].mean(0) for of_word in words]))


def smoothed(maps: Tensor, sigma: float = math.sqrt(0.5)) -> Tensor:
    """Maps [n, h, w] smoothed by a Gaussian over 3 x 3 positions, mirrored at the border.

    Attend-and-Excite speaks of a sigma of 0.5; the weights of its code, exp(-distance^2), are those of sqrt(0.5).
    """
    line = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device) / (2 * sigma**2))
    weights = line[:, None] * line[None, :]
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect" if min(maps.shape[-2:]) > 1 else "replicate")
    return F.conv2d(padded, (weights / weights.sum())[None, None])[:, 0]


def neglect(maps: Tensor) -> Tensor:
    """Attend-and-Excite's loss of maps [words, h, w] in [0, 1]: 1 - the highest value of the word that has the lowest.

    Source: Chefer et al., "Attend-and-Excite", SIGGRAPH 2023, equation 2.
    """
    return (1 - maps.flatten(1).amax(1)).clamp(min=0).max()


def segregation(maps: Tensor) -> Tensor:
    """A-STAR's first loss: the sum of the overlaps of all pairs of maps [words, h, w] (ICCV 2023)."""
    pairs = itertools.combinations(range(len(maps)), 2)
    return torch.stack([overlap(maps[i], maps[j]) for i, j in pairs] or [maps.sum() * 0]).sum()


def retention(maps: Tensor, before: Tensor) -> Tensor:
    """A-STAR's second loss: the sum over words of 1 - overlap with where the word was one step before.

    before: bool [words, h, w], the maps of that step, binarised.
    """
    return (1 - overlap(maps, before.to(maps.dtype))).sum()
