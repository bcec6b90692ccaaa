"""Fréchet distance between two sets of images, in the judge's feature space.

FID's formula (Heusel et al. 2017, arXiv 1706.08500) on another network's features: comparable only with distances in
the same feature space, never with a published FID.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _root(symmetric: Tensor) -> Tensor:
    """The square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(symmetric)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


class Reference:
    """A set of features `[n, d]` that others are compared with, again and again."""

    def __init__(self, features: Tensor) -> None:
        features = _checked("reference", features)
        covariance = torch.cov(features.T)
        self.mean: Tensor = features.mean(0)
        self.trace: Tensor = covariance.trace()
        self.root: Tensor = _root(covariance)

    def distance(self, features: Tensor) -> float:
        """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2) of features a `[n, d]` and these, in fp64.

        With X the centred features over sqrt(n - 1), S_a = X^T X, and the last trace is the sum of X S_b^1/2's singular values:
        for few images a small matrix's.
        """
        features = _checked("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(f"features must be {len(self.mean)} wide as the reference, got {features.shape[1]}")
        mean = features.mean(0)
        centred = (features - mean) / (len(features) - 1) ** 0.5
        shared = torch.linalg.svdvals(centred @ self.root).sum()
        apart = (mean - self.mean).square().sum()
        return max(0.0, (apart + centred.square().sum() + self.trace - 2 * shared).item())


def _checked(name: str, features: Tensor) -> Tensor:
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"{name} must be [n >= 2, d] features, got shape {tuple(features.shape)}")
    return features.double()


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Of features `[n, d]`. Symmetric, 0 for equal sets. Raises ValueError when a set has fewer than two rows or the widths
    differ."""
    for name, features in (("a", a), ("b", b)):
        _checked(name, features)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same width, got {a.shape[1]} and {b.shape[1]}")
    return Reference(b).distance(a)
