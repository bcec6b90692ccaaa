"""attention_map_ and attention_with_map_ on a CPU.

Block by block: scores, a softmax in their place, and their sum over heads. What is added to the maps is one [rows of the
block, t]. Threads share the maps and their positions: nobody else writes to theirs. A small call is one block of all its
batch rows: an op there takes little longer than its start.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import row_chunks
from ..threads import PIECES_A_THREAD, conducted, each, shares, threads, together
from .scores import (
    LANES,
    add_to_group,
    additive,
    counted_rows,
    head_weights,
    score_blocks,
)

__all__ = ["attention_map_cpu"]

# From how many scores on a call runs on threads that wait for no other at every op. Of fewer, handing out takes longer than it
# saves, unless other programs run beside it.
CONDUCTED_SCORES = 4 << 20
# The largest block of a call of fewer.
AT_ONCE_BYTES = 8 << 20
FEWEST_POSITIONS = 256  # of a thread
# What a thread takes where there is more than one such piece for each.
POSITIONS_A_PIECE = 1024


def _of_heads(values: Tensor, block: slice, heads: int) -> Tensor:
    """Of the [key heads, t, e] those that the query heads of a block read."""
    shared = heads // len(values)
    return values[block] if shared == 1 else values[[h // shared for h in range(block.start, block.stop)]]


def attention_map_cpu(maps: Tensor, query: Tensor, key: Tensor, *others: Any) -> None:
    """Adds to maps; fills `out` where it is given."""
    large = query.shape[:3].numel() * key.shape[2] >= CONDUCTED_SCORES
    run = conducted(_attention_in_blocks) if large else _attention_in_blocks
    run(None if large else AT_ONCE_BYTES, maps, query, key, *others)


def _attention_in_blocks(
    most: int | None,
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
    out: Tensor | None,
) -> None:
    """most: bytes of a block of a small call."""
    bias, weight = additive(mask, query, key), head_weights(head_weight, query)
    (batch, heads, n, _), n_tokens = query.shape, key.shape[2]
    groups = dict(counted_rows(group, maps.shape[0]))
    columns = -(-n_tokens // LANES) * LANES
    owned = None if tokens is None else (tokens >= 0) & (tokens < n_tokens)
    places = None if owned is None or tokens is None else torch.where(owned, tokens, 0)

    def add(b: int, positions: slice, summed: Tensor) -> None:
        if places is not None and owned is not None:
            summed = summed[:, places].masked_fill_(~owned, 0)
        add_to_group(maps[:, positions], groups[b], summed)

    def some(which: tuple[list[slice], slice]) -> None:
        """These batch rows and all heads, in order."""
        of_batch, positions = which
        for several in of_batch:
            one = several.stop - several.start == 1  # otherwise all heads of all of them are one block
            of_rows = None if bias is None else bias[several, :, positions].flatten(0, 1)
            q, k = query[several, :, positions].flatten(0, 1), key[several].flatten(0, 1)
            values = None if value is None or out is None else value[several].flatten(0, 1).to(weight.dtype)
            for block, rows, scores in score_blocks(q, k, scale, of_rows, columns, most):
                at = slice(positions.start + rows.start, positions.start + rows.stop)
                own = block if one else slice(heads)
                probabilities = torch.softmax(scores, -1, out=scores)
                if math.isnan(probabilities[..., 0].sum()):  # of rows whose scores are all -inf, perhaps
                    of_block = None if of_rows is None else of_rows[block, rows]
                    again = score_blocks(q[block, rows], _of_heads(k, block, len(q)), scale, of_block, n_tokens, most)
                    probabilities.masked_fill_((next(again)[2] == -torch.inf).all(-1, keepdim=True), 0)
                if out is not None and values is not None:
                    p, v, to = probabilities[..., :n_tokens], _of_heads(values, block, len(q)), out[several, own, at]
                    if one and to.dtype == p.dtype:
                        torch.bmm(p, v, out=to[0])
                    else:  # for several rows in less time than as many products in their places
                        to.copy_(torch.bmm(p, v).view(to.shape))
                for b, p in enumerate(probabilities.split(own.stop - (own.start or 0)), several.start):
                    if b in groups and head_weight is None:
                        add(b, at, p.sum(0)[:, :n_tokens])
                    elif b in groups:
                        add(b, at, torch.mv(p.view(len(p), -1).T, weight[own]).view(p.shape[1:])[:, :n_tokens])

    chains = [
        [slice(b, b + 1) for b in chain]
        for chain in _chains(groups, batch if out is not None else 0, query.device.type == "cpu")
    ]
    for_each = -(-threads() // len(chains)) if chains else 1
    count = max(for_each, min(PIECES_A_THREAD * for_each, n // POSITIONS_A_PIECE)) if threads() > 1 else 1
    if most is not None and sum(map(len, chains)) == batch and mask is None:
        chains = [row_chunks(batch, weight.dtype.itemsize * heads * n * columns, most)]
    parts = itertools.product(chains, shares(n, count, FEWEST_POSITIONS))
    together(each(some, parts))


def _chains(groups: dict[int, Tensor], batch: int, known: bool) -> list[list[int]]:
    """Batch rows that add to one map, in order; each of the others of `batch` for itself. All as one where the host does not
    know the groups, on a GPU."""
    if not known:
        rows = list(range(batch)) or list(groups)
        return [rows] if rows else []
    found: dict[int, list[int]] = {}
    for b in range(batch) if batch else groups:
        found.setdefault(int(groups[b]) if b in groups else -1 - b, []).append(b)
    return list(found.values())
