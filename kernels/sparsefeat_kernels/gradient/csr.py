"""The latent-major view of a batch of codes.

A code lists, row by row, which latents are active. Gradients of weights and statistics of latents need the opposite:
latent by latent, the rows that used it. `latent_major` sorts the entries once, stably, so that whatever walks a
latent's entries walks them in row order: sums come out the same on every run, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..code import check_code

__all__ = ["latent_major"]


def latent_major(indices: Tensor, values: Tensor, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """The entries of a padded code in latent-major order.

    Args:
        indices: [rows, k] int32 or int64, the latent of every entry.
        values: [rows, k]; entries whose value is 0 are padding.
        n_latents: the size of the dictionary.

    Returns:
        row_ids [rows * k] int64, the row of every entry in the new order;
        order [rows * k] int64, its position in the flattened code: `values.flatten()[order]` goes with `row_ids`;
        latent_offsets [n_latents + 1] int64: latent i owns the entries latent_offsets[i] .. latent_offsets[i + 1] - 1,
        in row order. The entries from latent_offsets[n_latents] on are padding, or have an index outside
        0 .. n_latents - 1; they belong to no latent. Nothing is promised about the order within them.

    Cost: one stable sort of rows * k keys and n_latents binary searches; no synchronisation with the device.

    Raises: ValueError or TypeError naming the argument, for other shapes or dtypes.

    Example:
        >>> indices = torch.tensor([[2, 0], [2, 1], [0, 0]], dtype=torch.int32)
        >>> values = torch.tensor([[5.0, 4.0], [3.0, 2.0], [1.0, 0.0]])
        >>> row_ids, order, offsets = latent_major(indices, values, 3)
        >>> row_ids, order, offsets
        (tensor([0, 2, 1, 0, 1, 2]), tensor([1, 4, 3, 0, 2, 5]), tensor([0, 2, 3, 5]))
    """
    check_code(values, indices, values.device, "values")
    owned = (values != 0) & (indices >= 0) & (indices < n_latents)
    keys = torch.where(owned, indices, n_latents).reshape(-1)
    keys, order = torch.sort(keys, stable=True)
    boundaries = torch.arange(n_latents + 1, device=keys.device, dtype=keys.dtype)
    return order // max(indices.shape[1], 1), order, torch.searchsorted(keys, boundaries)
