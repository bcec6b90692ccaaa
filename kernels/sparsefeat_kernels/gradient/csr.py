"""The latent-major view of a batch of codes.

A code lists, row by row, which latents are active. Gradients of weights and statistics of latents need the opposite:
latent by latent, the rows that used it. `latent_major` sorts the entries once, stably, so that whatever walks a
latent's entries walks them in row order: sums come out the same on every run, without atomics. `sorted_entries` is what the
kernels walk: the same order in one launch and one sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..code import check_code
from ..dispatch import jit_over_rows, tl

__all__ = ["latent_major", "sorted_entries"]


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


# ------------------------------------------------------------------------------------------------------------ Triton


@jit_over_rows
def _entry_keys_kernel(
    values_ptr,
    indices_ptr,
    group_ptr,
    keys_ptr,
    entries,
    k,
    groups,
    n_latents,
    of_none,
    stride_values_row,
    stride_values_k,
    stride_indices_row,
    stride_indices_k,
    stride_group,
    BLOCK_ENTRIES: tl.constexpr,
):
    """group * n_latents + latent of every entry; of_none of one that belongs to none."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    inside = entry < entries
    row, place = entry // k, entry % k
    value = tl.load(values_ptr + row * stride_values_row + place * stride_values_k, mask=inside, other=0.0)
    index = tl.load(indices_ptr + row * stride_indices_row + place * stride_indices_k, mask=inside, other=0).to(
        tl.int64
    )
    owned = (value != 0.0) & (index >= 0) & (index < n_latents)  # NaN != 0: it is summed
    if group_ptr is not None:
        group = tl.load(group_ptr + row * stride_group, mask=inside, other=-1).to(tl.int64)
        owned = owned & (group >= 0) & (group < groups)
        index += group * n_latents
    tl.store(keys_ptr + entry, tl.where(owned, index, of_none).to(keys_ptr.dtype.element_ty), mask=inside)


def sorted_entries(
    values: Tensor, indices: Tensor, n_latents: int, group: Tensor | None = None, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """keys [rows * k], ascending, and order [rows * k] int64, the position in the flattened code of the entry of each.

    The key of an entry is group[row] * n_latents + latent (without `group` the latent), as far as its value is not 0 and
    group and latent are in range, else groups * n_latents. Equal keys stand in row order. Keys are of the narrowest type
    that holds them: a GPU sorts eight bits at a time.
    """
    rows, k = indices.shape
    of_none = groups * n_latents
    dtype = next(t for t in (torch.int16, torch.int32, torch.int64) if of_none <= torch.iinfo(t).max)
    keys = torch.empty(rows * k, dtype=dtype, device=values.device)
    strides = *values.stride(), *indices.stride(), 0 if group is None else group.stride(0)
    with torch.cuda.device_of(values):
        _entry_keys_kernel[(-(-keys.numel() // 1024),)](
            values, indices, group, keys, keys.numel(), k, groups, n_latents, of_none, *strides, BLOCK_ENTRIES=1024,
            num_warps=4,
        )  # fmt: skip
    keys, order = keys.sort(stable=True)
    return keys, order
