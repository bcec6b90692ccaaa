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


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """||mu_a - mu_b||^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2) of features `[n, d]`, computed in fp64.

    Symmetric, 0 for equal sets. Raises ValueError when a set has fewer than two rows or the widths differ.
    """
    for name, features in (("a", a), ("b", b)):
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(f"{name} must be [n >= 2, d] features, got shape {tuple(features.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a and b must have the same width, got {a.shape[1]} and {b.shape[1]}")
    a, b = a.double(), b.double()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    root_a = _root(cov_a)
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return max(0.0, (mean + cov_a.trace() + cov_b.trace() - 2 * cross).item())
