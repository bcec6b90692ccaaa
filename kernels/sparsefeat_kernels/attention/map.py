"""attention_map_: attention probabilities summed over heads, into a map for each image; with the attention's output too."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    INTERPRETED,
    backend,
    has_warp_groups,
    implementation,
    jit,
    next_power_of_2,
    ops,
    register,
    registered,
    tl,
)
from ..flop_formulas import register_flop_formula
from .flash import flash
from .map_cpu import attention_map_cpu
from .scores import arguments, check_accumulator, check_device, check_query_and_key, check_tokens, dense_probabilities
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
    SHARED: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_VALUE: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one batch row, some heads, all keys; and of the batch rows after it that have its group. SHARED: it
    adds to no map; maps [parts of the heads, batch] have the sums, at the first batch row of each group."""
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
        if SHARED:
            g = tl.program_id(2).to(tl.int64) * batch + first
        if SELECTED:  # column by column: as exact as a copy, and few
            for j in range(0, n_selected):
                place = tl.cast(j, tl.int64)
                chosen = tl.load(tokens_ptr + place)
                column_sum = tl.sum(tl.where((token == chosen)[None, :], total, 0.0), axis=1)
                named = (chosen >= 0) & (chosen < n_tokens)
                ptrs = maps.ptr + g * maps.group + row * maps.row + place * maps.token
                if SHARED:
                    tl.store(ptrs, tl.where(named, column_sum, 0.0), mask=row < rows)
                else:
                    owned = (row < rows) & named
                    tl.store(ptrs, tl.load(ptrs, mask=owned) + column_sum, mask=owned)
        elif SHARED:
            ptrs = maps.ptr + g * maps.group + row[:, None] * maps.row + token[None, :] * maps.token
            tl.store(ptrs, total, mask=(row < rows)[:, None] & (token < n_tokens)[None, :])
        else:
            add_to_maps(maps, g, row, rows, token, n_tokens, total)


@jit
def _attention_map_join_kernel(
    maps,
    sums_ptr,
    group_ptr,
    batch,
    parts,
    rows,
    n_selected,
    groups,
    BLOCK_BATCH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """maps += the sums of all parts of the heads [parts, batch, rows, n_selected], of one batch row."""
    b = tl.program_id(1)
    g, leads = group_of(group_ptr, b, groups, BLOCK_BATCH)
    if (g >= 0) & leads:
        entry, entries = (
            tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK),
            tl.cast(rows, tl.int64) * n_selected,
        )
        inside = entry < entries
        ptrs = maps.ptr + g * maps.group + (entry // n_selected) * maps.row + (entry % n_selected) * maps.token
        total = tl.load(ptrs, mask=inside, other=0.0)
        for part in range(0, parts):
            total += tl.load(sums_ptr + (part * batch + b) * entries + entry, mask=inside, other=0.0)
        tl.store(ptrs, total, mask=inside)


@functools.lru_cache(maxsize=1024)
def _sizes(
    batch: int, heads: int, n: int, n_tokens: int, widest: int, full: bool, groups: bool, programs: int
) -> tuple[int, int, Mapping[str, int]]:
    """Blocks of rows, heads of a program, and the sizes of a block, for heads of up to `widest` columns. groups: matrix units
    that take the products of four warps together."""
    block_tokens = next_power_of_2(max(n_tokens, 16))
    # Many rows where the matrix units take 64 of them at once, up to 128 keys; elsewhere 64 rows spill, and 32 take 250
    # registers with the output. Few rows: smaller blocks, for more programs.
    large = groups and not full and block_tokens <= 128
    block_rows = (64 if large else 32) if n > 256 and not full else 32 if large else 16
    row_blocks = -(-n // block_rows)
    return row_blocks, -(-heads // max(1, programs // (row_blocks * batch))), {
        "BLOCK_BATCH": next_power_of_2(batch),
        "BLOCK_ROWS": block_rows,
        "BLOCK_TOKENS": block_tokens,
        # 64 rows of heads wider than 48 columns spill by chunks of 64.
        "BLOCK_D": min(next_power_of_2(max(widest, 16)), 32 if full or (block_rows == 64 and widest > 48) else 64),
        "num_warps": 8 if full or block_tokens > 128 else 4,
        # The next head's tiles are fetched ahead where two heads' fit (AMD: the compiler fails on it with the output), but for
        # `large`, whose products wait for theirs less than that takes.
        "num_stages": 1 if full or large or widest > 64 or backend() == "hip" else 2,
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
    (batch, heads, n, d), n_tokens = query.shape, key.shape[2]
    bias, is_masked = mask_argument(mask, query, key)
    d_value = d if value is None else value.shape[3]
    align, (queries, keys, *values) = aligned(query, key) if value is None else aligned(query, key, value)
    row_blocks, heads_each, blocks = _sizes(
        batch, heads, n, n_tokens, max(d, d_value), full, not INTERPRETED and has_warp_groups(), PROGRAMS
    )
    parts = -(-heads // heads_each)
    to = maps if parts == 1 else maps.new_empty(parts * batch, *maps.shape[1:])
    group = group.contiguous()
    with torch.cuda.device_of(query):
        _attention_map_kernel[(row_blocks, batch, parts)](
            Maps(to, *to.stride()), queries, keys, values[0] if values else None, None if out is None else heads_of(out),
            bias, weight_argument(head_weight), group, None if tokens is None else tokens.contiguous(),
            batch, heads, heads_each, n, n_tokens, maps.shape[2], maps.shape[0], scale * LOG2_E, heads // key.shape[1],
            OUTPUT=out is not None, WEIGHTED=head_weight is not None, SELECTED=tokens is not None,
            SHARED=parts > 1, MASK=is_masked, ALIGN=align, D=d, D_VALUE=d_value, **blocks,
        )  # fmt: skip
        if parts > 1:
            _attention_map_join_kernel[(-(-n * maps.shape[2] // 1024), batch)](
                Maps(maps, *maps.stride()), to, group, batch, parts, n, maps.shape[2], maps.shape[0],
                BLOCK_BATCH=blocks["BLOCK_BATCH"], BLOCK=1024, num_warps=4,
            )  # fmt: skip


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
