"""What is done to a row before encoding and undone after decoding."""

from __future__ import annotations

from torch import Tensor


def row_statistics(rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and scale of every row, both `[rows, 1]`; scale = unbiased standard deviation + eps.

    Unbiased (divisor `d_model - 1`) and with eps added to the deviation, not to the variance, as the published
    standardised SAEs have it (openai/sparse_autoencoder).
    """
    return rows.mean(-1, keepdim=True), rows.std(-1, keepdim=True, correction=1) + eps


def standardize(rows: Tensor, eps: float) -> Tensor:
    mean, scale = row_statistics(rows, eps)
    return (rows - mean) / scale


def unstandardize(standardized: Tensor, rows: Tensor, eps: float) -> Tensor:
    """The exact inverse, with the statistics of the original `rows`."""
    mean, scale = row_statistics(rows, eps)
    return standardized * scale + mean
