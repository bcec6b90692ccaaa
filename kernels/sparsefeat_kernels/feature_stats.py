"""feature_stats_: running sum, count and maximum of every latent, by group of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .code import check_code, within
from .dispatch import implementation, jit, jit_over_rows, ops, register, tl
from .gradient.csr import sorted_entries

__all__ = ["feature_stats_"]

LARGEST_INT32 = 2**31 - 1


def feature_stats_(sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor) -> None:
    """Add a batch of codes to the statistics of every latent, in place.

        for every row r with group[r] >= 0 and every entry (r, j) with value v = values[r, j] != 0:
            sum[g, i] += v;  count[g, i] += 1;  maximum[g, i] = max(maximum[g, i], v)    g = group[r], i = indices[r, j]

    Args:
        sum: [G, n_latents] float32; count: [G, n_latents] int32; maximum: [G, n_latents] float32, started by the
            caller (0, or -inf where values may be negative). All three contiguous.
        values: [rows, k] float32; indices: [rows, k] int32 or int64, entries out of range are skipped.
        group: [rows] int32 or int64: the row's concept, step, image...; rows with group < 0 are skipped, and so are
            rows with group >= G.

    The sum of a batch is added up in row order and with a fixed tree on a GPU: the same bits on every run, without
    float atomics. A NaN value makes its sum and maximum NaN.

    Cost: on a GPU one sort of rows * k keys and three launches; reads the code, reads and writes the touched statistics. Scratch is of the
    size of the code.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> sum, count, maximum = torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3)
        >>> values, indices = torch.tensor([[3.0, 1.0], [5.0, 0.0]]), torch.tensor([[2, 0], [2, 0]]).int()
        >>> feature_stats_(sum, count, maximum, values, indices, torch.tensor([0, 0]))
        >>> sum, count, maximum
        (tensor([[1., 0., 8.]]), tensor([[1, 0, 2]], dtype=torch.int32), tensor([[1., 0., 5.]]))
    """
    ops.feature_stats_(sum, count, maximum, values, indices, group)


def reference(
    sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of feature_stats_, entry by entry, on copies; any dtype."""
    sum, count, maximum = sum.clone(), count.clone(), maximum.clone()
    for r, g in enumerate(group.tolist()):
        for value, i in zip(values[r], indices[r].tolist(), strict=True):
            if g >= 0 and value != 0:
                sum[g, i] += value
                count[g, i] += 1
                maximum[g, i] = torch.maximum(maximum[g, i], value)
    return sum, count, maximum


def _check(sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor) -> None:
    check_code(values, indices, sum.device, "sum")
    if sum.dim() != 2:
        raise ValueError(f"sum must be [groups, n_latents], got shape {tuple(sum.shape)}")
    for name, tensor, dtype in (
        ("sum", sum, torch.float32),
        ("count", count, torch.int32),
        ("maximum", maximum, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != sum.shape:
            raise ValueError(f"{name} must have sum's shape {tuple(sum.shape)}, got {tuple(tensor.shape)}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}; it is written in place")
        if tensor.device != sum.device:
            raise ValueError(f"{name} must be on sum's device {sum.device}, got {tensor.device}; move one of them")
    if values.dtype != torch.float32:
        raise TypeError(f"values must be float32, got {values.dtype}; cast them with .float()")
    if group.dim() != 1 or group.shape[0] != values.shape[0]:
        raise ValueError(f"group must have shape ({values.shape[0]},), got {tuple(group.shape)}")
    if group.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group must be int32 or int64, got {group.dtype}")
    if group.device != sum.device:
        raise ValueError(f"group must be on sum's device {sum.device}, got {group.device}; move one of them")


def _statistic_keys(values: Tensor, indices: Tensor, group: Tensor, groups: int, n_latents: int) -> Tensor:
    """[rows, k] int64: group * n_latents + latent, or groups * n_latents for an entry that counts for nothing."""
    counted = (values != 0) & (indices >= 0) & (indices < n_latents)
    counted &= ((group >= 0) & (group < groups))[:, None]
    return torch.where(counted, group[:, None].long() * n_latents + indices, groups * n_latents)


# --------------------------------------------------------------------------------------------------------------- CPU


def _feature_stats_cpu(
    sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor
) -> None:
    """Scatters along an only dimension go through the entries in their order. Those of value 0 go along: they add 0."""
    groups, n_latents = sum.shape
    v = values.reshape(-1)
    if within(indices, n_latents) and within(group, groups):
        small = indices.dtype == torch.int32 and groups * n_latents <= LARGEST_INT32
        own = group.to(torch.int32 if small else torch.int64)
        keys = (
            torch.add(indices, own[:, None], alpha=n_latents).reshape(-1).long()
        )  # mixed, an addition takes twice as long
    else:
        keys = _statistic_keys(values, indices, group, groups, n_latents).reshape(-1)
        inside = keys < groups * n_latents
        keys, v = keys[inside], v[inside]
    if v.numel() and float(v.amin()) >= 0:  # not so with NaN. Two ops of whole vectors in the place of five
        active = v.view(torch.int32).clamp(0, 1)  # the bits of a positive number are one; -0.0 has negative ones
        counted = torch.nn.functional.threshold(v, 0.0, -torch.inf)
    else:
        active = (v != 0).int()
        counted = v.masked_fill(v == 0, -torch.inf)
    sum.view(-1).scatter_add_(0, keys, v)
    count.view(-1).scatter_add_(0, keys, active)
    maximum.view(-1).scatter_reduce_(0, keys, counted, "amax")


def _feature_stats_plainly_on_gpu(
    sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor
) -> None:
    """There scatters add in any order. index_put_ sorts, and adds in order."""
    groups, n_latents = sum.shape
    keys = _statistic_keys(values, indices, group, groups, n_latents).reshape(-1)
    counted = (keys < groups * n_latents).nonzero()[:, 0]
    keys, v = keys[counted], values.reshape(-1)[counted]
    sum.view(-1).index_put_((keys,), v, accumulate=True)
    count.view(-1).index_add_(0, keys, torch.ones_like(keys, dtype=torch.int32))
    maximum.view(-1).scatter_reduce_(0, keys, v, "amax")


# ------------------------------------------------------------------------------------------------------------ Triton
# Entries are sorted by (group, latent), rows in order. One program scans a block of them; runs that begin and end in it
# go straight to the tables, which nobody else touches at that place. A run that crosses into later blocks is left as
# partial results, and a second kernel, one program a block, joins those of the run that begins there, in order.


@jit
def _add_run(key_a, sum_a, count_a, maximum_a, key_b, sum_b, count_b, maximum_b):
    same = key_a == key_b
    highest = tl.maximum(maximum_a, maximum_b, propagate_nan=tl.PropagateNan.ALL)
    return (
        key_b,
        tl.where(same, sum_a + sum_b, sum_b),
        tl.where(same, count_a + count_b, count_b),
        tl.where(same, highest, maximum_b),
    )


@jit
def _add_to_tables(sum_ptr, count_ptr, maximum_ptr, key, total, number, highest, mask):
    tl.store(sum_ptr + key, tl.load(sum_ptr + key, mask=mask) + total, mask=mask)
    tl.store(count_ptr + key, tl.load(count_ptr + key, mask=mask) + number, mask=mask)
    before = tl.load(maximum_ptr + key, mask=mask)
    tl.store(maximum_ptr + key, tl.maximum(before, highest, propagate_nan=tl.PropagateNan.ALL), mask=mask)


@jit_over_rows
def _feature_stats_scan_kernel(
    keys_ptr,
    order_ptr,
    values_ptr,
    sum_ptr,
    count_ptr,
    maximum_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    partial_maximum_ptr,
    open_key_ptr,
    entries,
    n_statistics,
    BLOCK_ENTRIES: tl.constexpr,
):
    """Totals of the runs of equal keys in one block of sorted entries. partial_*[0] of a block: the run that began in an
    earlier block; partial_*[1]: the run that goes on in the next, whose key is open_key (-1: none)."""
    block = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK_ENTRIES)
    entry = block * BLOCK_ENTRIES + lane
    key = tl.load(keys_ptr + entry, mask=entry < entries, other=n_statistics)
    counted = key < n_statistics  # [BLOCK_ENTRIES]
    value = tl.load(values_ptr + tl.load(order_ptr + entry, mask=counted, other=0), mask=counted, other=0.0)
    _, total, number, highest = tl.associative_scan((key, value, counted.to(tl.int32), value), 0, _add_run)
    before = tl.load(keys_ptr + entry - lane - 1, mask=entry - lane > 0, other=-1)
    after = tl.load(keys_ptr + entry + 1, mask=entry + 1 < entries, other=-1)
    ends = counted & ((key != after) | (lane == BLOCK_ENTRIES - 1))
    carried = ends & (key == before)
    is_open = ends & (key == after) & (key != before)
    whole = ends & (key != after) & (key != before)
    _add_to_tables(sum_ptr, count_ptr, maximum_ptr, key, total, number, highest, whole)
    slot = 2 * block + is_open.to(tl.int64)
    tl.store(partial_sum_ptr + slot, total, mask=carried | is_open)  # at most one lane a slot
    tl.store(partial_count_ptr + slot, number, mask=carried | is_open)
    tl.store(partial_maximum_ptr + slot, highest, mask=carried | is_open)
    tl.store(open_key_ptr + block, tl.max(tl.where(is_open, key, -1), axis=0))


@jit_over_rows
def _feature_stats_join_kernel(
    keys_ptr,
    sum_ptr,
    count_ptr,
    maximum_ptr,
    partial_sum_ptr,
    partial_count_ptr,
    partial_maximum_ptr,
    open_key_ptr,
    entries,
    BLOCK_ENTRIES: tl.constexpr,
):
    """The run that a block leaves open, and its parts in the blocks after it, one after the other."""
    block = tl.program_id(0).to(tl.int64)
    key = tl.load(open_key_ptr + block)
    if key >= 0:
        total = tl.load(partial_sum_ptr + 2 * block + 1)
        number = tl.load(partial_count_ptr + 2 * block + 1)
        highest = tl.load(partial_maximum_ptr + 2 * block + 1)
        block += 1
        entry = block * BLOCK_ENTRIES
        goes_on = tl.load(keys_ptr + entry, mask=entry < entries, other=-1) == key
        while goes_on:
            total += tl.load(partial_sum_ptr + 2 * block)
            number += tl.load(partial_count_ptr + 2 * block)
            part = tl.load(partial_maximum_ptr + 2 * block)
            highest = tl.maximum(highest, part, propagate_nan=tl.PropagateNan.ALL)
            block += 1
            entry = block * BLOCK_ENTRIES
            goes_on = tl.load(keys_ptr + entry, mask=entry < entries, other=-1) == key
        _add_to_tables(sum_ptr, count_ptr, maximum_ptr, key, total, number, highest, True)


def _feature_stats_triton(
    sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor, block: int = 512
) -> None:
    groups, n_latents = sum.shape
    keys, order = sorted_entries(values, indices, n_latents, group, groups)
    entries = keys.shape[0]
    blocks = -(-entries // block)
    partial_sum, partial_maximum = sum.new_empty(2, blocks, 2)
    partial_count = count.new_empty(blocks, 2)
    open_key = keys.new_empty(blocks)
    with torch.cuda.device_of(sum):
        _feature_stats_scan_kernel[(blocks,)](
            keys, order, values.contiguous(), sum, count, maximum, partial_sum, partial_count, partial_maximum,
            open_key, entries, groups * n_latents, BLOCK_ENTRIES=block, num_warps=4,
        )  # fmt: skip
        _feature_stats_join_kernel[(blocks,)](
            keys, sum, count, maximum, partial_sum, partial_count, partial_maximum, open_key, entries,
            BLOCK_ENTRIES=block, num_warps=1,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


def _feature_stats(sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor) -> None:
    _check(sum, count, maximum, values, indices, group)
    if values.numel() == 0 or sum.numel() == 0:
        return
    plainly = _feature_stats_cpu if sum.device.type == "cpu" else _feature_stats_plainly_on_gpu
    run = _feature_stats_triton if implementation("feature_stats", sum) == "triton" else plainly
    run(sum, count, maximum, values, indices, group)


def _feature_stats_fake(
    sum: Tensor, count: Tensor, maximum: Tensor, values: Tensor, indices: Tensor, group: Tensor
) -> None:
    _check(sum, count, maximum, values, indices, group)


register(
    "feature_stats_",
    "(Tensor(a!) sum, Tensor(b!) count, Tensor(c!) maximum, Tensor values, Tensor indices, Tensor group) -> ()",
    _feature_stats,
    fake=_feature_stats_fake,
    mutates=("sum", "count", "maximum"),
)
