"""attention_map_ and attention_with_map_ on a CPU.

Block by block: scores, softmax, and a product with the head weights, which is the sum over heads. What is added to the
maps is one [rows of the block, t]. Threads share the maps and their positions: nobody else writes to theirs.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..products import product
from ..threads import PIECES_A_THREAD, conducted, each, shares, threads, together
from .scores import add_to_group, additive, counted_rows, head_weights, score_blocks, softmax_of

__all__ = ["attention_map_cpu"]

# From how many positions on a call runs on threads that wait for no other at every op, and how many each takes at least.
CONDUCTED_POSITIONS = 256
FEWEST_POSITIONS = 256
# What a thread takes where there is more than one such piece for each: products of half as many rows take a fifth longer.
# 2 x 8 heads of 80, 77 tokens, one core of an AMD EPYC: 5.3 ms at 1,024 positions, 6.2 in pieces of 512.
POSITIONS_A_PIECE = 1024


def _of_heads(values: Tensor, block: slice, heads: int) -> Tensor:
    """Of the [key heads, t, e] those that the query heads of a block read."""
    shared = heads // len(values)
    return values[block] if shared == 1 else values[[h // shared for h in range(block.start, block.stop)]]


def _times_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """[heads, rows, t] times [heads, t, e]; of one head by the library that takes one matrix at a time."""
    if len(probabilities) == 1:
        return product(probabilities[0], value[0].T)[None]
    return torch.bmm(probabilities, value)


def attention_map_cpu(maps: Tensor, query: Tensor, *others: Any) -> None:
    """Adds to maps; fills `out` where it is given."""
    run = conducted(_attention_in_blocks) if query.shape[2] >= CONDUCTED_POSITIONS else _attention_in_blocks
    run(maps, query, *others)


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
    owned = None if tokens is None else (tokens >= 0) & (tokens < n_tokens)
    places = None if owned is None or tokens is None else torch.where(owned, tokens, 0)

    def some(which: tuple[list[int], slice]) -> None:
        """These batch rows and all heads, in order."""
        of_batch, positions = which
        buffer: Tensor | None = None
        for b in of_batch:
            of_row = None if bias is None else bias[b][:, positions]
            values = None if value is None or out is None else value[b].to(weight.dtype)
            for block, rows, scores in score_blocks(query[b][:, positions], key[b], scale, of_row):
                if buffer is None:  # the first block is the largest
                    buffer = torch.empty_like(scores)
                at = slice(positions.start + rows.start, positions.start + rows.stop)
                last = buffer if buffer.shape == scores.shape else buffer.view(-1)[: scores.numel()].view(scores.shape)
                probabilities = softmax_of(scores, last)
                if out is not None and values is not None:
                    out[b, block, at] = _times_values(probabilities, _of_heads(values, block, heads))
                if b in groups:
                    if len(scores) == 1 and head_weight is None:
                        summed = probabilities[0]
                    else:
                        summed = torch.mv(probabilities.view(len(scores), -1).T, weight[block]).view(scores.shape[1:])
                    if places is not None and owned is not None:
                        summed = summed[:, places].masked_fill_(~owned, 0)
                    add_to_group(maps[:, at], groups[b], summed)

    n, chains = query.shape[2], _chains(groups, query.shape[0] if out is not None else 0)
    for_each = -(-threads() // len(chains)) if chains else 1
    count = max(for_each, min(PIECES_A_THREAD * for_each, n // POSITIONS_A_PIECE)) if threads() > 1 else 1
    together(each(some, itertools.product(chains, shares(n, count, FEWEST_POSITIONS))))


def _chains(groups: dict[int, Tensor], batch: int) -> list[list[int]]:
    """Batch rows that add to one map, in order; each of the others of `batch` for itself. All as one where nobody shares
    the work: on a GPU the host does not know the groups."""
    if threads() == 1:
        rows = list(range(batch)) or list(groups)
        return [rows] if rows else []
    found: dict[int, list[int]] = {}
    for b in range(batch) if batch else groups:
        found.setdefault(int(groups[b]) if b in groups else -1 - b, []).append(b)
    return list(found.values())
