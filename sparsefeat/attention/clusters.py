"""FINCH with the Kullback-Leibler divergence: rows that are distributions, grouped by who is whose nearest neighbour.

    KL(x_i || x_j) = sum_k x_ik (log x_ik - log x_jk);     nearest(i) = the j other than i with the smallest

Two rows are of one group if one is the other's nearest, or both have the same nearest, or are tied together by such. The
groups' means are grouped in turn, until one group is left, or nothing changes.

Source: Sarfraz et al., "Efficient Parameter-free Clustering Using First Neighbor Relations", CVPR 2019; ConceptExpress (ECCV
2024) for the divergence, the number of groups and the gate of the second grouping.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Rows whose products with all others are made at a time.
ROWS = 512


def nearest(rows: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of each row [n, d] of positive numbers that sum to 1: the nearest other, and its divergence. `allowed` bool [n, n]:
    which others count; where none does, the row itself and infinity.
    """
    n, logs = len(rows), rows.log()
    found, distances = [], []
    for first in range(0, n, ROWS):
        some = slice(first, min(first + ROWS, n))
        divergence = (rows[some] * logs[some]).sum(1, keepdim=True) - rows[some] @ logs.T  # [rows, n]
        own = torch.arange(some.start, some.stop, device=rows.device)
        divergence[own - first, own] = torch.inf
        if allowed is not None:
            divergence.masked_fill_(~allowed[some], torch.inf)
        distance, index = divergence.min(1)
        distances.append(distance)
        found.append(torch.where(distance.isfinite(), index, own))
    return torch.cat(found), torch.cat(distances)


def tied(neighbours: Tensor) -> Tensor:
    """Labels [n], from 0 in the order of their first rows, of what is connected by i - neighbours[i]."""
    n = len(neighbours)
    own = torch.arange(n, device=neighbours.device)
    labels = own.clone()
    while True:
        lower = torch.minimum(labels, labels[neighbours])
        lower = lower.scatter_reduce(0, neighbours, lower, "amin")  # what points here
        lower = lower[lower]
        if torch.equal(lower, labels):
            return labels.unique(return_inverse=True)[1]
        labels = lower


def means(rows: Tensor, labels: Tensor) -> Tensor:
    """The mean row of each label."""
    total = rows.new_zeros(int(labels.max()) + 1, rows.shape[1]).index_add_(0, labels, rows)
    return total / torch.bincount(labels)[:, None]


def partition(rows: Tensor, fewest: int) -> tuple[Tensor, Tensor]:
    """Labels [n] of the coarsest grouping that has at least `fewest` groups (the first one if none has); and the largest
    divergence between a row and its nearest in the first grouping.
    """
    neighbours, distances = nearest(rows)
    labels = tied(neighbours)
    limit = torch.where(distances.isfinite(), distances, 0).max()
    while True:
        count = int(labels.max()) + 1
        if count <= 2:
            return labels, limit
        coarser = tied(nearest(means(rows, labels))[0])
        merged_count = int(coarser.max()) + 1
        if merged_count < fewest or merged_count == count:
            return labels, limit
        labels = coarser[labels]


def merged(rows: Tensor, groups: Tensor, grid: tuple[int, int], limit: Tensor) -> Tensor:
    """Groups bool [g, positions] that touch each other in the picture and whose mean rows diverge by no more than `limit`,
    joined, as long as any do.
    """
    while len(groups) > 1:
        mean = (groups.to(rows.dtype) @ rows) / groups.sum(1, keepdim=True)
        neighbours, distances = nearest(mean, _touching(groups, grid))
        own = torch.arange(len(groups), device=rows.device)
        neighbours = torch.where(distances <= limit, neighbours, own)
        labels = tied(neighbours)
        if int(labels.max()) + 1 == len(groups):
            break
        groups = torch.stack([groups[labels == label].any(0) for label in range(int(labels.max()) + 1)])
    return groups


def _touching(groups: Tensor, grid: tuple[int, int]) -> Tensor:
    """bool [g, g]: which groups have positions side by side."""
    maps = groups.unflatten(1, grid)
    grown = maps.clone()
    grown[:, 1:] |= maps[:, :-1]
    grown[:, :-1] |= maps[:, 1:]
    grown[:, :, 1:] |= maps[:, :, :-1]
    grown[:, :, :-1] |= maps[:, :, 1:]
    return (grown.flatten(1).double() @ groups.double().T) > 0
