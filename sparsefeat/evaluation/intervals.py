"""95 % intervals of what is counted and of what is measured.

A share is drawn from Jeffreys' posterior, Beta(k + 1/2, n - k + 1/2), so that 12 of 12 has an interval too, where resampling
would have none. What is made of several shares is made of their draws. Other figures are resampled over images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

DRAWS = 2000
RESAMPLES = 100
"""Of a Fréchet distance, each some milliseconds of processor time."""


def share_draws(right: Tensor, seed: int) -> Tensor:
    """fp64 [DRAWS], the posterior of the share of True in `right` [n]; parts of one (a tie) count as such."""
    k, n = float(right.sum()), len(right)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.distributions.Beta(torch.tensor(k + 0.5, dtype=torch.float64), n - k + 0.5).sample((DRAWS,))


def interval(draws: Tensor) -> tuple[float, float]:
    """The middle 95 % of them."""
    low, high = draws.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def resampled(values: Tensor, statistic: Callable[[Tensor], float], seed: int = 0, times: int = DRAWS) -> Tensor:
    """fp64 [times]: `statistic` of rows of `values` [n, ...] drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    draws = (torch.randint(len(values), (len(values),), generator=generator) for _ in range(times))
    return torch.tensor([statistic(values[drawn]) for drawn in draws], dtype=torch.float64)


def mean_interval(values: Tensor, seed: int = 0) -> tuple[float, float]:
    """Of the mean of `values` [n]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator)
    return interval(values.double()[drawn].mean(1))


def around(value: float, draws: Tensor) -> tuple[float, float]:
    """Of a figure that is larger on resampled images than on all of them (a Fréchet distance is): the draws' spread about
    their own mean, laid around the value."""
    low, high = interval(draws - draws.mean() + value)
    return low, high
