"""attention_tap_: a few columns of an attention that ran elsewhere, from its log-sum-exp, summed over heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import block_bytes, implementation, jit, next_power_of_2, ops, register, registered, row_chunks, tl
from ..flop_formulas import register_flop_formula
from .scores import (
    BLOCK_BYTES,
    add_to_group,
    additive,
    arguments,
    check_accumulator,
    check_lse,
    check_query_and_key,
    counted_rows,
    dense_probabilities,
    head_weights,
    score_blocks,
)
from .tiles import (
    LOG2_E,
    Maps,
    add_to_maps,
    aligned,
    group_of,
    head_product,
    heads_of,
    load_rows,
    mask_argument,
    masked,
    weight_argument,
)

__all__ = ["attention_tap_", "attention_tap_local_"]


def attention_tap_(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> None:
    """Add the head-summed probabilities of a few keys of a larger attention to maps, in place.

        maps[group[b], i, j] += sum over h of head_weight[h] exp(scale query[b, h, i] . key[b, h, j] + mask - lse[b, h, i])

    for every b with group[b] >= 0. In a joint attention of image and text: query the image's rows, key the text's, lse
    what the attention (or `attention_rows`) says of the image's rows; neither the attention nor its matrix is needed.

    Args:
        maps: [groups, n, t] float32 (float64 for a float64 query); strides are free.
        query: [batch, heads, n, d], any rows of the attention's queries; key: [batch, key heads, t, d], any of its keys,
            in any order, rotary embeddings and normalisation applied to both; key heads divide heads. float32, float64,
            bfloat16 or float16.
        lse: [batch, heads, n] float32 (float64 for float64): the natural logarithm of the sum over *all* keys of
            exp(scale q . k + mask). -inf (a row whose keys are all masked): probability 0.
        scale, mask, head_weight, group: as in `attention_map_`; the mask is that of the keys given here.

    An lse of another kernel may differ by its rounding, and probabilities with it by that factor (1e-3 in bf16): nothing
    is clamped. Rows of one group and heads are added in order: the same bits every run. No gradients.

    Cost: 2 B heads n t d FLOPs and B heads n t exponentials, B the rows that are counted. Reads query once every 64
    keys; key and lse; reads and writes the maps. [heads, n, t] is never held: no scratch on a GPU, 1 MiB on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> maps = torch.zeros(1, 1, 1)
        >>> query, key = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]])
        >>> lse = torch.tensor([[[1.313262]]])  # log(exp(0) + exp(1))
        >>> attention_tap_(maps, query, key[:, :, 1:], lse)
        >>> maps
        tensor([[[0.7311]]])
    """
    scale, group = arguments(query, scale, group)
    ops.attention_tap_(maps, query, key, lse, scale, mask, head_weight, group)


def attention_tap_local_(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
) -> None:
    """`attention_tap_` without a log-sum-exp: the softmax is over the keys given here alone, as if only they existed.

    It is `attention_map_` by another name, for attentions whose backend gives no log-sum-exp.
    """
    scale, group = arguments(query, scale, group)
    ops.attention_map_(maps, query, key, scale, mask, head_weight, group, None)


def reference(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> Tensor:
    """The meaning of attention_tap_: the new maps. Dense, any dtype."""
    scores = dense_probabilities(query, key, scale, mask)[0]
    probabilities = torch.where((lse == -torch.inf)[..., None], 0, (scores - lse[..., None]).exp())
    weight = query.new_ones(query.shape[1]) if head_weight is None else head_weight.to(query.dtype)
    summed = torch.einsum("bhnt,h->bnt", probabilities, weight)
    maps = maps.clone()
    for b, g in enumerate(group.tolist()):
        if 0 <= g < len(maps):
            maps[g] += summed[b]
    return maps


def _check(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    check_query_and_key("attention_tap", query, key, mask)
    check_lse(lse, query)
    check_accumulator("maps", maps, (query.shape[2], key.shape[2]), query, head_weight, group)


ROOM_OF_KEYS = 64  # whose scores of all heads are one block; of more, blocks of fewer heads


def _attention_tap_cpu(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    bias, weight = additive(mask, query, key), head_weights(head_weight, query)
    (_, heads, n, d), n_tokens, wide = query.shape, key.shape[2], weight.dtype
    shared = heads // key.shape[1]
    # Keys are few: with them for rows the product is three times as fast (8 x 40 by 40 x 4096: 0.4 ms for 1.2).
    a_position = heads * wide.itemsize * (min(n_tokens, ROOM_OF_KEYS) + (d if query.dtype != wide else 0))
    parts = row_chunks(n, a_position, block_bytes(query, BLOCK_BYTES), block=16)
    for b, g in counted_rows(group, maps.shape[0]):
        keys = key[b] if shared == 1 else key[b, [h // shared for h in range(heads)]]
        of_row = lse[b].masked_fill(lse[b] == -torch.inf, torch.inf)  # exp(score - inf) is 0
        for part in parts:
            of_part = None if bias is None else bias[b][:, part].mT
            for block, tokens, scores in score_blocks(keys, query[b][:, part], scale, of_part):
                probabilities = scores.sub_(of_row[block, None, part]).exp_()
                summed = torch.mv(probabilities.view(scores.shape[0], -1).T, weight[block])
                add_to_group(maps[:, part, tokens].mT, g, summed.view(scores.shape[1:]))


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _attention_tap_kernel(
    maps,
    query,
    key,
    lse,
    mask,
    weight_ptr,
    group_ptr,
    batch,
    heads,
    rows,
    n_tokens,
    groups,
    scale,
    heads_per_key,
    WEIGHTED: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows and of keys of one batch row, all heads; and of the batch rows after it that have its group."""
    # Programs that share rows are neighbours: a tile of the query comes from memory once.
    token_blocks = tl.cdiv(n_tokens, BLOCK_TOKENS)
    row = (tl.program_id(0) // token_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    first = tl.program_id(1)
    g, leads = group_of(group_ptr, first, groups, BLOCK_BATCH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for other in range(first, batch):
        b = tl.cast(other, tl.int64)
        mine = (g >= 0) & leads & (tl.load(group_ptr + b).to(tl.int64) == g)
        for h in range(0, tl.where(mine, heads, 0)):  # another program's batch row: no head
            head = tl.cast(h, tl.int64)
            scores = head_product(
                query, key, b, head, head // heads_per_key, row, rows, token, n_tokens,
                D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_D,
            )  # fmt: skip
            scores = masked(scores * scale, mask, b, head, row, rows, token, n_tokens, MASK)
            of_row = load_rows(lse, b, head, row, rows, 0.0) * 1.4426950408889634  # [BLOCK_ROWS]
            of_row = tl.where(of_row == float("-inf"), float("inf"), of_row)
            p = tl.exp2(scores - of_row[:, None])  # [BLOCK_ROWS, BLOCK_TOKENS]
            if WEIGHTED:
                p *= tl.load(weight_ptr + head)
            total += p
    if (g >= 0) & leads:
        add_to_maps(maps, g, row, rows, token, n_tokens, total)


def attention_tap_triton(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    (batch, heads, n, d), n_tokens, full = query.shape, key.shape[2], query.dtype == torch.float32
    if maps.numel() == 0:
        return
    bias, is_masked = mask_argument(mask, query, key)
    align, (queries, keys) = aligned(query, key)
    # 64 x 64 of d = 128: 64 KiB of shared memory in two stages; 64 x 128 needs 100, or spills on sm_80.
    block_tokens = min(next_power_of_2(max(n_tokens, 16)), 32 if full else 64)
    block_rows = 16 if n <= 256 else 32 if n <= 1024 or full else 64
    row_blocks, token_blocks = -(-n // block_rows), -(-n_tokens // block_tokens)
    # Fetched ahead is a whole head of both, 16 KiB every 64 columns and stage: 256 columns need 128 KiB, 512 do not fit.
    stages = 1 if full or d > 160 else 2
    with torch.cuda.device_of(query):
        _attention_tap_kernel[(row_blocks * token_blocks, batch)](
            Maps(maps, *maps.stride()), queries, keys, heads_of(lse), bias, weight_argument(head_weight),
            group.contiguous(), batch, heads, n, n_tokens, maps.shape[0], scale * LOG2_E, heads // key.shape[1],
            WEIGHTED=head_weight is not None, MASK=is_masked, ALIGN=align, D=d,
            BLOCK_BATCH=next_power_of_2(batch), BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens,
            BLOCK_D=min(next_power_of_2(max(d, 16)), 32 if full else 64), num_warps=4, num_stages=stages,
        )  # fmt: skip


def tap_of_tokens_triton(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
    tokens: Tensor | None,
) -> None:
    """`attention_tap_` of the keys that are named; of those out of range nothing, which is a mask of -inf."""
    bias = additive(mask, query, key)
    if tokens is not None:
        owned = (tokens >= 0) & (tokens < key.shape[2])
        at = torch.where(owned, tokens, 0)
        key = key.index_select(2, at)
        kept = torch.where(owned, 0.0, -torch.inf)[None, None, None, :]
        # Of a bias that is expanded only its own numbers are gathered.
        bias = kept.expand(query.shape[0], 1, 1, -1) if bias is None else _folded(bias).index_select(3, at) + kept
        bias = bias.expand(*query.shape[:3], -1)
    attention_tap_triton(maps, query, key, lse, scale, bias, head_weight, group)


def _folded(bias: Tensor) -> Tensor:
    """An expanded tensor without its repetitions, except along the last dimension."""
    for dim in range(3):
        bias = bias.narrow(dim, 0, 1) if bias.stride(dim) == 0 else bias
    return bias


# ------------------------------------------------------------------------------------------------------- registration


def _attention_tap(
    maps: Tensor,
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    group: Tensor,
) -> None:
    _check(maps, query, key, lse, scale, mask, head_weight, group)
    if maps.numel() == 0 or query.numel() == 0:
        return
    run = attention_tap_triton if implementation("attention_tap", query) == "triton" else _attention_tap_cpu
    run(maps, query, key, lse, scale, mask, head_weight, group)


register(
    "attention_tap_",
    "(Tensor(a!) maps, Tensor query, Tensor key, Tensor lse, float scale, Tensor? mask, Tensor? head_weight, "
    "Tensor group) -> ()",
    _attention_tap,
    fake=_check,
    mutates=("maps",),
)


@register_flop_formula(registered.attention_tap_)
def _attention_tap_flops(maps: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Of all batch rows: what is counted is only known on the device."""
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d
