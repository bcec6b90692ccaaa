"""Dot products of chosen pairs of rows on a CPU: without gathering either side, which costs more than the products."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

__all__ = ["pair_products"]


def pair_products(x: Tensor, W: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """x[r] . W[columns[j]] for every j from offsets[r] up to offsets[r + 1], [entries].

    x [rows, d] and W [n, d] are float32 or float64 on the CPU; offsets [rows + 1] and columns [entries] int64, in range,
    a column as often as one likes. Torch calls this a sampled product: of x W^T the entries of a CSR pattern.
    """
    if len(columns) > len(x) * len(W):  # a pattern with entries twice is none that torch takes; all pairs are fewer
        rows = torch.repeat_interleave(torch.arange(len(x)), offsets.diff())
        return (x @ W.T)[rows, columns]
    _quiet()
    zeros = x.new_zeros(len(columns))
    pattern = torch.sparse_csr_tensor(offsets, columns, zeros, size=(len(x), len(W)), check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, x.contiguous(), W.T, beta=0.0).values()


@functools.cache
def _quiet() -> None:
    """Torch says once that its CSR tensors are in beta: not of interest to whoever encodes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(torch.zeros(2, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
