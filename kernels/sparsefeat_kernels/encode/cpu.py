"""topk_encode by plain torch calls, written for a CPU's caches; also what a GPU gets for float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..dispatch import block_bytes, next_power_of_2, row_chunks, sum_dtype
from ..threads import conducted, each, together
from .keys import largest, relu_in_order
from .product import preactivations

__all__ = ["PREACTIVATION_BYTES", "group_size", "select", "topk_encode_cpu"]

# Bounds on what one call holds beside its inputs and outputs; with preactivations' together below 64 MiB.
PREACTIVATION_BYTES = 24 << 20  # pre-activations and centred inputs of one chunk of rows; below 32 MiB malloc keeps it
SELECTION_BYTES = 1 << 20  # int64 keys of one block of rows: they stay in a core's L2

# Rows go in chunks. A chunk's pre-activations are one matrix product into a scratch that every chunk reuses. To select,
# the scratch is read once for the largest value of every group of neighbouring latents; a row's k largest entries lie
# in the k groups with the largest maxima (ties: the lower group), because an entry of any other group is beaten by the
# k maxima. So only k * group values of n_latents are looked at again.


def group_size(n_latents: int, k: int) -> int:
    """Latents a group: the power of two near sqrt(n / k), where maxima (n / group) and candidates (k * group) are as few
    as they can be together. 1 when groups would not pay, that is when k is a large part of n."""
    size = next_power_of_2(int((n_latents / k) ** 0.5))
    return size if size >= 4 else 1


@conducted
def topk_encode_cpu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str,
    also: Callable[[Tensor, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`also(a, first_row)` sees every chunk's pre-activations [chunk, n_latents] before the next takes their place."""
    rows, d = x.shape
    n_latents, dtype = W_enc.shape[0], sum_dtype(x)
    group = group_size(n_latents, k)
    padded = -(-n_latents // group) * group
    values = x.new_empty(rows, k, dtype=dtype)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    chunks = row_chunks(rows, (padded + d) * dtype.itemsize, PREACTIVATION_BYTES)
    scratch = x.new_empty(chunks[0].stop if chunks else 0, padded, dtype=dtype)
    # Padding never wins: it has the lowest value there is and the highest indices.
    scratch[:, n_latents:] = 0 if selection == "signed" else -torch.inf
    select_bytes = 8 * max(k * group, padded // group)
    for part in chunks:
        a = scratch[: part.stop - part.start]
        preactivations(x[part], W_enc, b_enc, b_pre, a[:, :n_latents])
        start = part.start

        def choose(block: slice, a: Tensor = a, start: int = start) -> None:
            out = slice(start + block.start, start + block.stop)
            values[out], indices[out] = select(a[block], k, group, selection)

        together(each(choose, row_chunks(len(a), select_bytes, block_bytes(x, SELECTION_BYTES))))
        if also is not None:
            also(a[:, :n_latents], part.start)
    return values, indices


def select(a: Tensor, k: int, group: int, selection: str) -> tuple[Tensor, Tensor]:
    """Values and columns of the k entries of every row of `a` [rows, groups * group] that `selection` asks for."""
    rows, signed = a.shape[0], selection == "signed"
    if group == 1:
        columns = largest(a, k, signed)
        broken = a.isnan().any(dim=1)
    else:
        grouped = a.view(rows, -1, group)
        maxima = grouped.amax(dim=2)
        if signed:
            maxima = torch.maximum(maxima, -grouped.amin(dim=2))
        broken = maxima.isnan().any(dim=1)
        searched = min(k, maxima.shape[1])
        groups = largest(maxima, searched, signed=False).sort(dim=1).values  # ascending: candidates in index order
        first_group = torch.arange(rows, device=a.device)[:, None] * maxima.shape[1]
        candidates = a.view(-1, group).index_select(0, (groups + first_group).view(-1)).view(rows, -1)
        place = largest(candidates, k, signed)
        columns = groups.gather(1, place // group) * group + place % group
    values = a.gather(1, columns)
    # On a CPU a look saves the work; elsewhere the host would wait for the device to answer. The result is the same.
    look = a.device.type == "cpu"
    if selection == "relu" and not (look and bool((values[:, -1] > 0).all())):
        values, columns = relu_in_order(values, columns)
    if not look or bool(broken.any()):
        values = torch.where(broken[:, None], torch.nan, values)
        columns = torch.where(broken[:, None], torch.arange(k, device=a.device), columns)
    return values, columns
