"""Whether two trainings from other seeds find the same dictionary."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sparsefeat.arguments import finite

ALIKE = 0.7  # cosine from which two latents count as the same


class Stability(NamedTuple):
    """cosine: mean over the pairs of the best one-to-one matching. shared: share of the pairs above `ALIKE`."""

    cosine: float
    shared: float


def stability(first: Tensor, second: Tensor) -> Stability:
    """Of two sets of directions `[n, d]`, by the matching of largest summed cosine (Hungarian, scipy); of sets of different
    size the smaller is matched.

    Leave out latents that never fire: they are where they started. Two random sets are far from 0: measure that too.
    """
    from scipy.optimize import linear_sum_assignment

    for name, given in (("first", first), ("second", second)):
        if given.ndim != 2 or not len(given):
            raise ValueError(f"{name} has shape {list(given.shape)}: pass directions [n, d], at least one")
    unit = [torch.nn.functional.normalize(finite("directions", one).double(), dim=1) for one in (first, second)]
    cosine = unit[0] @ unit[1].T
    rows, columns = linear_sum_assignment(cosine.numpy(force=True), maximize=True)
    matched = cosine[torch.from_numpy(rows), torch.from_numpy(columns)]
    return Stability(float(matched.mean()), float((matched > ALIKE).double().mean()))
