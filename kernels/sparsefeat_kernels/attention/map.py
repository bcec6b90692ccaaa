"""attention_map_: attention probabilities summed over heads, into a map for each image; with the attention's output too."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import backend, implementation, jit, next_power_of_2, ops, register, registered, replayed, tl
from ..flop_formulas import register_flop_formula
from .flash import flash
from .map_cpu import attention_map_cpu
from .scores import (
    additive,
    arguments,
    check_accumulator,
    check_device,
    check_query_and_key,
    check_tokens,
    dense_probabilities,
)
from .tap import tap_of_tokens_triton
from .tiles import (
    LOG2_E,
    Maps,
    add_to_maps,
    aligned,
    group_of,
    head_product,
    heads_of,
    load_tile,
    mask_argument,
    masked,
    store_tile,
    weight_argument,
)

__all__ = ["attention_map_", "attention_with_map_"]


def attention_map_(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
    tokens: Tensor | None = None,
) -> None:
    """Add the head-summed attention probabilities of a batch to maps, in place.

        P[b, h, i, t] = softmax over t of (scale query[b, h, i] . key[b, h, t] + mask[b, h, i, t])
        maps[group[b], i, j] += sum over h of head_weight[h] P[b, h, i, tokens[j]]      for every b with group[b] >= 0

    With text tokens as keys these are DAAM's maps of a cross-attention layer. With the text keys of a joint attention
    they are the maps renormalised over the text, which need no log-sum-exp (`attention_tap_` has those that are not).

    Args:
        maps: [groups, n, t], or [groups, n, len(tokens)]; float32 (float64 for a float64 query); strides are free.
        query: [batch, heads, n, d], float32, float64, bfloat16 or float16; key: [batch, key heads, t, d], where key
            heads divide heads (grouped queries: query head h reads key head h // (heads / key heads)). Strides are free.
        scale: default 1 / sqrt(d).
        mask: bool (True is kept) or a floating bias, [batch, t], or four dimensions that broadcast to
            [batch, heads, n, t]. A key masked by False, or by a bias below -1e30, has probability 0 whatever it holds;
            a row without any key that is not has probability 0 everywhere.
        head_weight: [heads] floating; default 1 each.
        group: [batch] int32 or int64: the map that a batch row adds to; rows with group < 0 or >= groups add nothing and
            cost nothing. Default: row b adds to map b.
        tokens: [any] int32 or int64: the keys that have a map; out of range: nothing is added. Default: all.

    Products and sums are fp32 (fp64 for float64; fp32 inputs: IEEE products, never TF32), exponentials of differences
    to the row's maximum, so that no score overflows. Rows of one group are added in order, heads in order: the same bits
    every run. NaN in a row of query makes that row of the map NaN; a score of +inf too. No gradients.

    Cost: 2 B heads n t d FLOPs and B heads n t exponentials, B the rows that are counted; twice the products above 256
    keys. Reads query and key, reads and writes the maps once. [batch, heads, n, t] is never held: scratch is some MiB for
    each thread on a CPU; on a GPU 4 batch heads n bytes above 256 keys, and up to there, where blocks of rows are fewer
    than a GPU's programs, some copies of the maps.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> maps = torch.zeros(1, 1, 2)
        >>> query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
        >>> attention_map_(maps, query, key)
        >>> maps  # softmax of (0, 1)
        tensor([[[0.2689, 0.7311]]])

    Source: Tang et al., "What the DAAM", ACL 2023, section 3, for the sum over heads.
    """
    scale, group = arguments(query, scale, group)
    ops.attention_map_(maps, query, key, scale, mask, head_weight, group, tokens)


def attention_with_map_(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The attention's output, and in the same pass what `attention_map_` adds to maps.

        out[b, h, i] = sum over t of P[b, h, i, t] value[b, h, t]        P as in attention_map_

    Args:
        value: [batch, key heads, t, e] in query's dtype; the others as in `attention_map_`.

    Returns:
        [batch, heads, n, e] in value's dtype, for every batch row, whatever its group; in memory [batch, n, heads, e],
        so that `.transpose(1, 2).flatten(2)` copies nothing. Probabilities are rounded to value's dtype before their
        product on a GPU, as in every flash attention. 0 in rows in which every key is masked. No gradients.

    Cost: 2 batch heads n t (d + e) FLOPs; reads query, key and value, writes out, reads and writes the maps. Above 256
    keys on a GPU the scores are computed twice for the rows that are counted. Scratch as in `attention_map_`.

    Raises: as attention_map_.

    Example:
        >>> maps = torch.zeros(1, 1, 2)
        >>> query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
        >>> attention_with_map_(maps, query, key, torch.tensor([[[[10.0], [20.0]]]]))
        tensor([[[[17.3106]]]])
        >>> maps
        tensor([[[0.2689, 0.7311]]])
    """
    scale, group = arguments(query, scale, group)
    return ops.attention_with_map_(maps, query, key, value, scale, mask, head_weight, group, tokens)


def reference(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The meaning of both ops: the new maps, and the output. Dense, any dtype."""
    probabilities = dense_probabilities(query, key, scale, mask)[1]
    weight = query.new_ones(query.shape[1]) if head_weight is None else head_weight.to(query.dtype)
    summed = torch.einsum("bhnt,h->bnt", probabilities, weight)
    maps = maps.clone()
    chosen = list(range(key.shape[2])) if tokens is None else tokens.tolist()
    for b, g in enumerate(group.tolist()):
        for j, t in enumerate(chosen):
            if 0 <= g < len(maps) and 0 <= t < key.shape[2]:
                maps[g, :, j] += summed[b, :, t]
    return maps, probabilities @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _check(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> None:
    check_query_and_key("attention_map", query, key, mask)
    check_tokens(tokens, query)
    selected = key.shape[2] if tokens is None else tokens.shape[0]
    check_accumulator("maps", maps, (query.shape[2], selected), query, head_weight, group)


def _check_value(value: Tensor, query: Tensor, key: Tensor) -> None:
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or value.shape[3] == 0:
        raise ValueError(
            f"value must be [{', '.join(map(str, key.shape[:3]))}, e] to match key, got shape {tuple(value.shape)}"
        )
    if value.dtype != query.dtype:
        raise TypeError(f"value must have query's dtype {query.dtype}, got {value.dtype}; cast one of them")
    check_device("value", value, query)


# ------------------------------------------------------------------------------------------------------------ Triton
# Up to 256 keys one tile holds a row's whole softmax. A program takes a block of rows of one batch row through all
# heads: the sum over heads stays in registers and is written once, by the only program that owns those rows.
# Above, a flash loop leaves the log-sum-exp of every row and head (and the output), and attention_tap_'s kernel makes
# the maps from it. So it does for the output of fp32 inputs, whose products are fused multiply-adds of registers: a
# whole row's probabilities times values spill them.

ONE_TILE = 256
# Where blocks of rows are fewer, their heads are shared out: two programs for each of an H100's 132 multiprocessors. A head
# after the other waits for its loads and its softmax: 64 programs of 20 heads (SDXL at 32 x 32) take 38 us by
# `python -m bench.predict`'s model, 256 of 5 heads 10, and the sum of what they leave 6.
PROGRAMS = 264


@jit
def _attention_map_kernel(
    maps,
    query,
    key,
    value,
    out,
    mask,
    weight_ptr,
    group_ptr,
    tokens_ptr,
    batch,
    heads,
    heads_each,
    rows,
    n_tokens,
    n_selected,
    groups,
    scale,
    heads_per_key,
    OUTPUT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SELECTED: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_VALUE: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one batch row, some heads, all keys; and of the batch rows after it that have its group. Heads that
    are shared out each have a copy of the maps."""
    first_head = tl.program_id(2) * heads_each
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1)
    token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    g, leads = group_of(group_ptr, first, groups, BLOCK_BATCH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for other in range(first, batch):
        b = tl.cast(other, tl.int64)
        same = tl.load(group_ptr + b).to(tl.int64) == g
        if OUTPUT:
            mine = tl.where(g >= 0, leads & same, b == first)
        else:
            mine = (g >= 0) & leads & same
        last_head = tl.where(mine, tl.minimum(first_head + heads_each, heads), 0)
        for h in range(first_head, last_head):  # another program's batch row: no head
            head = tl.cast(h, tl.int64)
            key_head = head // heads_per_key
            scores = head_product(
                query, key, b, head, key_head, row, rows, token, n_tokens,
                D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_D,
            )  # fmt: skip
            scores = masked(scores * scale, mask, b, head, row, rows, token, n_tokens, MASK)
            highest = tl.max(scores, axis=1)
            p = tl.exp2(scores - tl.where(highest == float("-inf"), 0.0, highest)[:, None])
            sums = tl.sum(p, axis=1)  # 1 at least, or 0 where every key is masked, and then so is p
            p *= (1 / tl.where(sums == 0, 1.0, sums))[:, None]  # [BLOCK_ROWS, BLOCK_TOKENS]
            if WEIGHTED:
                total += p * tl.load(weight_ptr + head)
            else:
                total += p
            if OUTPUT:
                for start in tl.static_range(0, D_VALUE, BLOCK_D):
                    column = start + tl.arange(0, BLOCK_D)
                    v = load_tile(value, b, key_head, token, n_tokens, column, D_VALUE, ALIGN)
                    o = tl.dot(p.to(v.dtype), v, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_D]
                    store_tile(out, b, head, row, rows, column, D_VALUE, o)
    if (g >= 0) & leads:
        g += tl.program_id(2).to(tl.int64) * groups
        if SELECTED:  # column by column: as exact as a copy, and few
            for j in range(0, n_selected):
                place = tl.cast(j, tl.int64)
                chosen = tl.load(tokens_ptr + place)
                column_sum = tl.sum(tl.where((token == chosen)[None, :], total, 0.0), axis=1)
                owned = (row < rows) & (chosen >= 0) & (chosen < n_tokens)
                ptrs = maps.ptr + g * maps.group + row * maps.row + place * maps.token
                tl.store(ptrs, tl.load(ptrs, mask=owned) + column_sum, mask=owned)
        else:
            add_to_maps(maps, g, row, rows, token, n_tokens, total)


@functools.lru_cache(maxsize=1024)
def _sizes(
    batch: int, heads: int, n: int, n_tokens: int, widest: int, full: bool, programs: int
) -> tuple[int, int, Mapping[str, int]]:
    """Blocks of rows, heads of a program, and the sizes of a block, for heads of up to `widest` columns."""
    block_tokens = next_power_of_2(max(n_tokens, 16))
    # 32 rows of 128 keys: 250 registers with the output, and 128 programs at 64 x 64 positions, an H100's 132
    # multiprocessors; 64 rows spill. Few rows: smaller blocks still, for more programs.
    block_rows = 16 if n <= 256 or full else 32
    row_blocks = -(-n // block_rows)
    return row_blocks, -(-heads // max(1, programs // (row_blocks * batch))), {
        "BLOCK_BATCH": next_power_of_2(batch),
        "BLOCK_ROWS": block_rows,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_D": min(next_power_of_2(max(widest, 16)), 32 if full else 64),
        "num_warps": 8 if full or block_tokens > 128 else 4,
        # The next head's tiles are fetched ahead where two heads' fit (AMD: the compiler fails on it with the output).
        "num_stages": 1 if full or widest > 64 or backend() == "hip" else 2,
    }  # fmt: skip


def _attention_triton(
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
    """Adds to maps; fills `out` where it is given."""
    full = query.dtype == torch.float32
    if key.shape[2] > ONE_TILE or (full and out is not None):
        lse = flash(maps.shape[0], query, key, value, scale, mask, group, out)
        tap_of_tokens_triton(maps, query, key, lse, scale, mask, head_weight, group, tokens)
        return
    # Heads that are shared out each have a copy of the maps.
    parts = _parts(maps, query, key, value)[2]
    to = maps[None] if parts == 1 else maps.new_zeros(parts, *maps.shape)
    weight = weight_argument(head_weight)
    _to_copies(to, query, key, value, scale, additive(mask, query, key), weight, group.contiguous(), tokens, out)
    if parts > 1:
        maps += to.sum(0)


def _parts(maps: Tensor, query: Tensor, key: Tensor, value: Tensor | None) -> tuple[int, int, int, Mapping[str, int]]:
    """Blocks of rows, heads of a program, parts of the heads, and the sizes of a block."""
    (batch, heads, n, d), full = query.shape, query.dtype == torch.float32
    widest = d if value is None else max(d, value.shape[3])
    row_blocks, heads_each, blocks = _sizes(batch, heads, n, key.shape[2], widest, full, PROGRAMS)
    return row_blocks, heads_each, -(-heads // heads_each), blocks


def _launch(
    to: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    scale: float,
    bias: Tensor | None,
    weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
    out: Tensor | None,
) -> None:
    """Adds to the copies [parts, groups, n, t]."""
    (batch, heads, n, d), n_tokens = query.shape, key.shape[2]
    row_blocks, heads_each, parts, blocks = _parts(to[0], query, key, value)
    mask, is_masked = mask_argument(bias, query, key)
    align, (queries, keys, *values) = aligned(query, key) if value is None else aligned(query, key, value)
    with torch.cuda.device_of(query):
        _attention_map_kernel[(row_blocks, batch, parts)](
            Maps(to, *to.stride()[1:]), queries, keys, values[0] if values else None, None if out is None else heads_of(out),
            mask, weight, group, None if tokens is None else tokens.contiguous(),
            batch, heads, heads_each, n, n_tokens, to.shape[3], to.shape[1], scale * LOG2_E, heads // key.shape[1],
            OUTPUT=out is not None, WEIGHTED=weight is not None, SELECTED=tokens is not None, MASK=is_masked,
            ALIGN=align, D=d, D_VALUE=d if value is None else value.shape[3], **blocks,
        )  # fmt: skip


_to_copies = replayed(_launch)


# ------------------------------------------------------------------------------------------------------- registration


def _attention_map(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> None:
    _check(maps, query, key, scale, mask, head_weight, group, tokens)
    if maps.numel() == 0 or query.numel() == 0 or key.shape[2] == 0:
        return
    run = _attention_triton if implementation("attention_map", query) == "triton" else attention_map_cpu
    run(maps, query, key, None, scale, mask, head_weight, group, tokens, None)


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, n, _ = query.shape
    return value.new_empty(batch, n, heads, value.shape[3]).transpose(1, 2)


def _attention_with_map(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    _check(maps, query, key, scale, mask, head_weight, group, tokens)
    _check_value(value, query, key)
    out = _empty_output(query, value)
    if out.numel() == 0 or key.shape[2] == 0:
        return out.zero_()
    run = _attention_triton if implementation("attention_map", query) == "triton" else attention_map_cpu
    run(maps, query, key, value, scale, mask, head_weight, group, tokens, out)
    return out


def _attention_with_map_fake(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> Tensor:
    _check(maps, query, key, scale, mask, head_weight, group, tokens)
    _check_value(value, query, key)
    return _empty_output(query, value)


register(
    "attention_map_",
    "(Tensor(a!) maps, Tensor query, Tensor key, float scale, Tensor? mask, Tensor? head_weight, Tensor group, "
    "Tensor? tokens) -> ()",
    _attention_map,
    fake=_check,
    mutates=("maps",),
)

register(
    "attention_with_map_",
    "(Tensor(a!) maps, Tensor query, Tensor key, Tensor value, float scale, Tensor? mask, Tensor? head_weight, "
    "Tensor group, Tensor? tokens) -> Tensor",
    _attention_with_map,
    fake=_attention_with_map_fake,
    mutates=("maps",),
)


@register_flop_formula(registered.attention_map_)
def _attention_map_flops(maps: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Of all batch rows: what is counted is only known on the device."""
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d


@register_flop_formula(registered.attention_with_map_)
def _attention_with_map_flops(maps: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * (d + value[3])
