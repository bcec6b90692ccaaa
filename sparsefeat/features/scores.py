"""How strongly a latent belongs to a concept."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number


def normalized_mean_difference(target: Tensor, others: Tensor, eps: float = 1e-8) -> Tensor:
    """SAeUron's score (arXiv 2501.18052, section 4.1): s_i = mu_i / (sum mu + eps) - mu'_i / (sum mu' + eps).

    Args:
        target, others: [..., n_latents] mean activations over *all* positions (zeros included) with and without the
            concept. The result sums to 0 over the latents; it is positive where the latent's share is larger with it.

    Raises:
        ValueError: numbers that are not finite; a negative `eps`.
    """
    target, others = finite("target", target).double(), finite("others", others).double()
    number("eps", eps, 0)
    share = target / (target.sum(-1, keepdim=True) + eps)
    return share - others / (others.sum(-1, keepdim=True) + eps)


def strictly_above_quantile(scores: Tensor, percentile: float) -> Tensor:
    """Indices, ascending, of the scores strictly above their `percentile`, interpolated linearly between two scores.

    With 20,480 distinct scores the 99.999th percentile leaves 1, the 99.995th 2, the 99.99th 3.
    """
    number("percentile", percentile, 0, 100)
    # Not torch.quantile: it refuses more than 2**24 values, and SAEs may grow.
    ordered = scores.double().sort().values
    position = percentile / 100 * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    cut = ordered[low] + (ordered[high] - ordered[low]) * (position - low)
    return (scores.double() > cut).nonzero()[:, 0]


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """Probability that a draw of `positive` exceeds one of `negative`, ties counted half (the area under the ROC).

    Raises:
        ValueError: one of the two is empty, or not finite.
    """
    if not len(positive) or not len(negative):
        raise ValueError(
            f"the area needs both kinds of examples; got {len(positive)} positive, {len(negative)} negative."
        )
    ordered = finite("negative", negative).double().sort().values
    positive = finite("positive", positive).double().contiguous()
    below = torch.searchsorted(ordered, positive, right=False)
    not_above = torch.searchsorted(ordered, positive, right=True)
    return float((below + not_above).double().mean() / (2 * len(negative)))
