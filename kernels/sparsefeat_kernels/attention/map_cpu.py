"""attention_map_ and attention_with_map_ on a CPU.

Block by block: scores, a softmax in their place, and their sum over heads. What is added to the maps is one [rows of the
block, t]. Threads share the maps and their positions: nobody else writes to theirs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

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
    (conducted(_attention_in_blocks) if large else _attention_in_blocks)(maps, query, key, *others)


def _attention_in_blocks(
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
    bias, weight = additive(mask, query, key), head_weights(head_weight, query)
    groups, heads, n_tokens = dict(counted_rows(group, maps.shape[0])), query.shape[1], key.shape[2]
    columns = -(-n_tokens // LANES) * LANES
    owned = None if tokens is None else (tokens >= 0) & (tokens < n_tokens)
    places = None if owned is None or tokens is None else torch.where(owned, tokens, 0)

    def add(b: int, positions: slice, summed: Tensor) -> None:
        if places is not None and owned is not None:
            summed = summed[:, places].masked_fill_(~owned, 0)
        add_to_group(maps[:, positions], groups[b], summed)

    def some(which: tuple[list[int], slice]) -> None:
        """These batch rows and all heads, in order."""
        of_batch, positions = which
        for b in of_batch:
            of_row = None if bias is None else bias[b][:, positions]
            values = None if value is None or out is None else value[b].to(weight.dtype)
            for block, rows, scores in score_blocks(query[b][:, positions], key[b], scale, of_row, columns):
                at = slice(positions.start + rows.start, positions.start + rows.stop)
                probabilities = torch.softmax(scores, -1, out=scores)
                if math.isnan(probabilities[..., 0].sum()):  # of rows whose scores are all -inf, perhaps
                    of_block = None if of_row is None else of_row[block, rows]
                    k = _of_heads(key[b], block, heads)
                    again = score_blocks(query[b, block, at], k, scale, of_block, n_tokens)  # as large a block
                    probabilities.masked_fill_((next(again)[2] == -torch.inf).all(-1, keepdim=True), 0)
                if out is not None and values is not None:
                    p, v, to = probabilities[..., :n_tokens], _of_heads(values, block, heads), out[b, block, at]
                    if to.dtype == p.dtype:
                        torch.bmm(p, v, out=to)
                    else:
                        to.copy_(torch.bmm(p, v))
                if b in groups:
                    if head_weight is None:
                        summed = probabilities.sum(0)
                    else:
                        summed = torch.mv(probabilities.view(len(scores), -1).T, weight[block]).view(scores.shape[1:])
                    add(b, at, summed[:, :n_tokens])

    n, chains = query.shape[2], _chains(groups, query.shape[0] if out is not None else 0, query.device.type == "cpu")
    for_each = -(-threads() // len(chains)) if chains else 1
    count = max(for_each, min(PIECES_A_THREAD * for_each, n // POSITIONS_A_PIECE)) if threads() > 1 else 1
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
