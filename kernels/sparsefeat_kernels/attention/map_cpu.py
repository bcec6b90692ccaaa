"""attention_map_ and attention_with_map_ on a CPU.

Block by block: scores, softmax, and a product with the head weights, which is the sum over heads. What is added to the
maps is one [rows of the block, t]. Threads share the maps and their positions: nobody else writes to theirs.

Many positions and no mask: head by head, in the ops that have to be and no other. Two threads that each call a hundred small ones
wait for Python's lock as long as they compute.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from ..dispatch import sum_dtype
from ..products import product
from ..threads import PIECES_A_THREAD, conducted, each, shares, threads, together
from .scores import (
    ALONE_POSITIONS,
    BLOCK_BYTES,
    add_to_group,
    additive,
    counted_rows,
    head_weights,
    score_blocks,
    softmax_of,
)

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
    factors = weight.tolist() if query.device.type == "cpu" else []
    groups, heads, n_tokens = dict(counted_rows(group, maps.shape[0])), query.shape[1], key.shape[2]
    owned = None if tokens is None else (tokens >= 0) & (tokens < n_tokens)
    places = None if owned is None or tokens is None else torch.where(owned, tokens, 0)

    def add(b: int, positions: slice, summed: Tensor) -> None:
        if places is not None and owned is not None:
            summed = summed[:, places].masked_fill_(~owned, 0)
        add_to_group(maps[:, positions], groups[b], summed)

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
                    add(b, at, summed)

    def head_by_head(which: tuple[list[int], slice]) -> None:
        """The same of rows without a mask, a head's products alone."""
        of_batch, positions = which
        total = weight.new_zeros(positions.stop - positions.start, n_tokens)
        probabilities = torch.empty_like(total)
        for b in of_batch:
            to = None if out is None else out[b, :, positions].unbind()
            views = _heads(query[b, :, positions], key[b], None if value is None else value[b], scale)
            for h, (q, k, v) in enumerate(views):
                torch.softmax(product(q.to(total.dtype), k), -1, out=probabilities)
                total.add_(probabilities, alpha=factors[h])
                if to is not None and v is not None:
                    to[h].copy_(product(probabilities, v))
        if math.isnan(total[:, 0].sum()):  # of rows whose scores are all -inf, perhaps
            some(which)
        elif of_batch[0] in groups:
            add(of_batch[0], positions, total)

    n, chains = query.shape[2], _chains(groups, query.shape[0] if out is not None else 0, query.device.type == "cpu")
    for_each = -(-threads() // len(chains)) if chains else 1
    count = max(for_each, min(PIECES_A_THREAD * for_each, n // POSITIONS_A_PIECE)) if threads() > 1 else 1
    alone = mask is None and query.device.type == "cpu" and n >= ALONE_POSITIONS
    if alone:  # no longer pieces than a block of scores is
        count = max(count, -(-n * n_tokens * weight.dtype.itemsize // BLOCK_BYTES))
    parts = itertools.product(chains, shares(n, count, FEWEST_POSITIONS))
    together(each(head_by_head if alone else some, parts))


def _heads(
    query: Tensor, key: Tensor, value: Tensor | None, scale: float
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Of every query head of one batch row: its query as it is, its key and its value as `product` takes them, in the dtype of sums."""
    shared = len(query) // len(key)
    keys = key.to(sum_dtype(query)).mul(scale).contiguous().unbind()
    values = [None] * len(keys) if value is None else value.to(sum_dtype(query)).contiguous().mT.unbind()
    return [(q, keys[h // shared], values[h // shared]) for h, q in enumerate(query.unbind())]


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
