"""concept_attention and concept_map_: queries that nobody wrote into the prompt, over themselves and an image."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import (
    block_bytes,
    implementation,
    jit,
    next_power_of_2,
    ops,
    register,
    registered,
    row_chunks,
    sum_dtype,
    tl,
)
from ..products import product
from ..threads import conducted, each, shares, threads, together
from .scores import (
    BLOCK_BYTES,
    add_to_group,
    arguments,
    check_accumulator,
    check_device,
    check_query_and_key,
    counted_rows,
)
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
    softmax_start,
    softmax_step,
    store_tile,
    tile_scores,
    weight_argument,
)

__all__ = ["concept_attention", "concept_map_"]


def concept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_key: Tensor,
    image_value: Tensor,
    scale: float | None = None,
) -> Tensor:
    """The attention of a few concepts over themselves and an image, whose keys and values stay where they are.

        out[b, h, c] = sum over t of P[b, h, c, t] [value; image_value][b, h, t]
        P[b, h, c] = softmax over the concepts' and the image's keys of scale query[b, h, c] . [key; image_key][b, h, t]

    Args:
        query, key: [batch, heads, c, d], value: [batch, heads, c, e]: of the concepts. float32, float64, bfloat16 or
            float16, one dtype for all five.
        image_key: [batch, heads, n, d]; image_value: [batch, heads, n, e]: of the image, as the model's own attention had
            them. Strides are free. n may be 0.
        scale: default 1 / sqrt(d).

    Returns:
        [batch, heads, c, e] in value's dtype; in memory [batch, c, heads, e]. Products and sums are fp32 (fp64 for
        float64; fp32 inputs: IEEE products, never TF32); on a GPU probabilities are rounded to value's dtype before their
        product, as in every flash attention. A score of NaN or +inf makes its row NaN. The same bits every run: parts of
        the image are joined in order. No gradients.

    Cost: 2 batch heads c (c + n) (d + e) FLOPs; reads image_key and image_value once for every 64 concepts. Scratch: on
    a GPU 4 (e + 2) batch heads c bytes for every 512 keys; on a CPU twice the result, in half precision 1 MiB or
    one head's scores, 4 c (c + n) bytes.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> one, image = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 1)
        >>> concept_attention(one, one, 4 * one, image, 0 * image)  # a quarter of its own value, three of the image's
        tensor([[[[1.]]]])

    Source: Helbling et al., "ConceptAttention", ICML 2025, section 3.
    """
    scale, _ = arguments(query, scale, None)
    return ops.concept_attention(query, key, value, image_key, image_value, scale)


def concept_map_(
    maps: Tensor,
    output: Tensor,
    concepts: Tensor,
    head_weight: Tensor | None = None,
    group: Tensor | None = None,
    softmax: bool = True,
) -> None:
    """Add how well the attention output at every image position fits each concept's, to maps, in place.

        S[b, i, c] = sum over h of head_weight[h] output[b, h, i] . concepts[b, h, c]
        maps[group[b], i] += softmax over c of S[b, i]       (S itself with softmax=False), for every b with group[b] >= 0

    Both are outputs of one attention before its projection, of the image's rows and of `concept_attention`.

    Args:
        maps: [groups, n, c] float32 (float64 for a float64 output); strides are free.
        output: [batch, heads, n, e]; concepts: [batch, heads, c, e]; float32, float64, bfloat16 or float16. c is at most
            256.
        head_weight: [heads] floating; default 1 each.
        group: [batch] int32 or int64, as in `attention_map_`. Default: row b adds to map b.

    Products and sums as in `attention_map_`; rows of one group are added in order. NaN in a row makes that row of the map
    NaN. No gradients.

    Cost: 2 B heads n c e FLOPs, B the rows that are counted: as many as the head-wide product [n, heads e] x [heads e, c].
    Reads output and concepts once, reads and writes the maps once. Scratch: none on a GPU, 4 n c bytes on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices.

    Example:
        >>> maps = torch.zeros(1, 1, 2)
        >>> concept_map_(maps, torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0], [1.0]]]]))
        >>> maps  # softmax of (0, 1)
        tensor([[[0.2689, 0.7311]]])

    Source: Helbling et al., "ConceptAttention", ICML 2025: the output-space projection, softmax over the concepts.
    """
    _, group = arguments(output, None, group)
    ops.concept_map_(maps, output, concepts, head_weight, group, softmax)


def reference(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float
) -> Tensor:
    """The meaning of concept_attention: dense, any dtype."""
    keys, values = torch.cat([key, image_key], dim=2), torch.cat([value, image_value], dim=2)
    return (torch.einsum("bhcd,bhtd->bhct", query, keys) * scale).softmax(-1) @ values


def reference_map(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> Tensor:
    """The meaning of concept_map_: the new maps. Dense, any dtype."""
    weight = output.new_ones(output.shape[1]) if head_weight is None else head_weight.to(output.dtype)
    scores = torch.einsum("bhne,bhce,h->bnc", output, concepts, weight)
    added = scores.softmax(-1) if softmax else scores
    maps = maps.clone()
    for b, g in enumerate(group.tolist()):
        if 0 <= g < len(maps):
            maps[g] += added[b]
    return maps


def _check(query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor) -> None:
    check_query_and_key("concept_attention", query, key, None)
    batch, heads, _, d = query.shape
    if key.shape != query.shape:
        raise ValueError(f"key must have query's shape {tuple(query.shape)}, got {tuple(key.shape)}")
    if value.dim() != 4 or value.shape[:3] != query.shape[:3] or value.shape[3] == 0:
        raise ValueError(f"value must be {[*query.shape[:3], 'e']} to match query, got shape {tuple(value.shape)}")
    if image_key.dim() != 4 or image_key.shape[:2] != (batch, heads) or image_key.shape[3] != d:
        raise ValueError(f"image_key must be [{batch}, {heads}, n, {d}], got shape {tuple(image_key.shape)}")
    expected = (*image_key.shape[:3], value.shape[3])
    if image_value.shape != expected:
        raise ValueError(f"image_value must be {list(expected)}, got shape {tuple(image_value.shape)}")
    for name, tensor in (("value", value), ("image_key", image_key), ("image_value", image_value)):
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}; cast one of them")
        check_device(name, tensor, query)


MOST_CONCEPTS = 256


def _check_map(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    if output.dim() != 4 or output.shape[3] == 0:
        raise ValueError(f"output must be [batch, heads, n, e] with e > 0, got shape {tuple(output.shape)}")
    batch, heads, n, e = output.shape
    if concepts.dim() != 4 or (*concepts.shape[:2], concepts.shape[3]) != (batch, heads, e):
        raise ValueError(f"concepts must be [{batch}, {heads}, c, {e}] to match output, got {tuple(concepts.shape)}")
    if concepts.shape[2] > MOST_CONCEPTS:
        raise ValueError(f"concepts must be at most {MOST_CONCEPTS}, got {concepts.shape[2]}; split them")
    for name, tensor in (("output", output), ("concepts", concepts)):
        if tensor.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}")
    if concepts.dtype != output.dtype:
        raise TypeError(f"concepts must have output's dtype {output.dtype}, got {concepts.dtype}; cast one of them")
    check_device("concepts", concepts, output)
    check_accumulator("maps", maps, (n, concepts.shape[2]), output, head_weight, group)


# --------------------------------------------------------------------------------------------------------------- CPU


@conducted
def _concept_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float, out: Tensor
) -> None:
    batch, heads, c, _ = query.shape
    wide, n = sum_dtype(query), image_key.shape[2]

    def joined(piece: tuple[int | slice, slice]) -> None:
        """Two attentions of torch's, joined by their log-sum-exps."""
        (of_own, own_lse), (of_image, image_lse) = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query[piece], k[piece], v[piece], scale=scale)
            for k, v in ((key, value), (image_key, image_value))
        )
        out[piece] = torch.lerp(of_image, of_own, torch.sigmoid(own_lse - image_lse)[..., None])

    def dense(piece: tuple[int, slice]) -> None:
        q = query[piece].to(wide) * scale
        scores = q.new_empty(q.shape[0], c, c + n)
        torch.matmul(q, key[piece].to(wide).mT, out=scores[:, :, :c])
        torch.matmul(q, image_key[piece].to(wide).mT, out=scores[:, :, c:])
        p = torch.softmax(scores, -1, out=scores)
        own = torch.bmm(p[:, :, :c], value[piece].to(wide))
        out[piece] = own.baddbmm_(p[:, :, c:], image_value[piece].to(wide)).to(out.dtype)

    # Torch's rounds the probabilities of half precision, and takes one width for keys and values.
    if query.device.type == "cpu" and query.dtype == wide and query.shape[3] == value.shape[3] and n:
        together(each(joined, [(slice(None), of_heads) for of_heads in shares(heads, threads())]))
        return
    most = block_bytes(query, BLOCK_BYTES) // threads()
    blocks = row_chunks(heads, c * (c + n) * wide.itemsize, most)
    if len(blocks) < threads():
        blocks = shares(heads, threads())
    together(each(dense, itertools.product(range(batch), blocks)))


# Numbers of an output, from which on a thread of its own is worth waking.
CONDUCTED_NUMBERS = 1 << 20


def _concept_map_cpu(maps: Tensor, output: Tensor, *others: Any) -> None:
    run = conducted(_concept_map_in_blocks) if output.numel() >= CONDUCTED_NUMBERS else _concept_map_in_blocks
    run(maps, output, *others)


def _concept_map_in_blocks(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    wide, counted = sum_dtype(output), counted_rows(group, maps.shape[0])

    def some(positions: slice) -> None:
        """All batch rows, in order."""
        for b, g in counted:
            # As one product over heads and width, without a copy where heads lie side by side.
            rows, columns = output[b, :, positions].transpose(0, 1), concepts[b].transpose(0, 1).to(wide)
            if head_weight is not None:
                columns = columns * head_weight.to(wide)[:, None]
            scores = product(rows.flatten(1).to(wide), columns.flatten(1))
            add_to_group(maps[:, positions], g, torch.softmax(scores, -1) if softmax else scores)

    together(each(some, shares(output.shape[2], threads())))


# ------------------------------------------------------------------------------------------------------------ Triton
# A program of concept_attention takes a part of the keys of one head: a head alone, of 24, would leave most of a card
# idle. What it leaves (the largest score, the sum of exponentials, the sum of values) is joined in order.

KEYS_A_PART = 512


@jit
def _concept_attention_kernel(
    query,
    key,
    value,
    mask,
    partial_ptr,
    sums_ptr,
    heads,
    rows,
    n_tokens,
    before,
    its_parts,
    parts,
    scale,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    D_VALUE: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """A block of concepts of one head over PART keys; `before` parts of other keys come before these."""
    part = tl.program_id(0) % its_parts
    row = (tl.program_id(0) // its_parts).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    column, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_VALUE)
    q = load_tile(query, b, head, row, rows, column, D, ALIGN)
    highest, sums = softmax_start(BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for start in range(part * PART, min((part + 1) * PART, n_tokens), BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        k = load_tile(key, b, head, token, n_tokens, column, D, ALIGN)
        scores = tile_scores(q, k, scale, mask, b, head, row, rows, token, n_tokens, 0)
        p, shrink, _, highest, sums = softmax_step(scores, highest, sums)
        v = load_tile(value, b, head, token, n_tokens, wide, D_VALUE, ALIGN)
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    at = ((b * heads + head) * parts + before + part) * rows + row
    inside = (row < rows)[:, None] & (wide < D_VALUE)[None, :]
    tl.store(partial_ptr + at[:, None] * D_VALUE + wide[None, :], total, mask=inside)
    tl.store(sums_ptr + at * 2, highest, mask=row < rows)
    tl.store(sums_ptr + at * 2 + 1, sums, mask=row < rows)


@jit
def _concept_attention_join_kernel(
    out,
    partial_ptr,
    sums_ptr,
    heads,
    rows,
    parts,
    D_VALUE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
):
    """A block of concepts of one head: its parts, one after the other."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    wide = tl.arange(0, BLOCK_VALUE)
    inside = (row < rows)[:, None] & (wide < D_VALUE)[None, :]
    highest, sums = softmax_start(BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for part in range(0, parts):
        at = ((b * heads + head) * parts + part) * rows + row
        its_highest = tl.load(sums_ptr + at * 2, mask=row < rows, other=0.0)
        higher = tl.maximum(highest, its_highest)
        mine, its = tl.exp2(highest - higher), tl.exp2(its_highest - higher)
        sums = sums * mine + tl.load(sums_ptr + at * 2 + 1, mask=row < rows, other=1.0) * its
        added = tl.load(partial_ptr + at[:, None] * D_VALUE + wide[None, :], mask=inside, other=0.0)
        total = total * mine[:, None] + added * its[:, None]
        highest = higher
    store_tile(out, b, head, row, rows, wide, D_VALUE, total / sums[:, None])


def _concept_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float, out: Tensor
) -> None:
    (batch, heads, c, d), n, e = query.shape, image_key.shape[2], value.shape[3]
    full = query.dtype == torch.float32
    own, of_image = -(-c // KEYS_A_PART), -(-n // KEYS_A_PART)
    parts = own + of_image
    partial = torch.empty(batch, heads, parts, c, e, dtype=torch.float32, device=query.device)
    sums = torch.empty(batch, heads, parts, c, 2, dtype=torch.float32, device=query.device)
    block_rows = min(next_power_of_2(max(c, 16)), 16 if full else 64)
    block_d, block_value = next_power_of_2(max(d, 16)), next_power_of_2(max(e, 16))
    row_blocks, (no_mask, _) = -(-c // block_rows), mask_argument(None, query, key)
    with torch.cuda.device_of(query):
        for k, v, before, its_parts in ((key, value, 0, own), (image_key, image_value, own, of_image)):
            if its_parts:
                align, (queries, keys, values) = aligned(query, k, v)
                _concept_attention_kernel[(row_blocks * its_parts, heads, batch)](
                    queries, keys, values, no_mask, partial, sums, heads, c, k.shape[2], before, its_parts, parts,
                    scale * LOG2_E, ALIGN=align, D=d, D_VALUE=e, PART=KEYS_A_PART,
                    BLOCK_ROWS=block_rows, BLOCK_TOKENS=16 if full else 32, BLOCK_D=block_d, BLOCK_VALUE=block_value,
                    num_warps=4, num_stages=1 if full or max(d, e) > 160 else 2,
                )  # fmt: skip
        _concept_attention_join_kernel[(row_blocks, heads, batch)](
            heads_of(out), partial, sums, heads, c, parts, D_VALUE=e, BLOCK_ROWS=block_rows,
            BLOCK_VALUE=block_value, num_warps=4,
        )  # fmt: skip


@jit
def _concept_map_kernel(
    maps,
    output,
    concepts,
    weight_ptr,
    group_ptr,
    batch,
    heads,
    rows,
    n_concepts,
    groups,
    WEIGHTED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_BATCH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of rows of one batch row, all heads and concepts; and of the batch rows after it that have its group."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first = tl.program_id(1)
    token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    g, leads = group_of(group_ptr, first, groups, BLOCK_BATCH)
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for other in range(first, batch):
        b = tl.cast(other, tl.int64)
        mine = (g >= 0) & leads & (tl.load(group_ptr + b).to(tl.int64) == g)
        if mine:
            scores = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
            for h in range(0, heads):
                head = tl.cast(h, tl.int64)
                product = head_product(
                    output, concepts, b, head, head, row, rows, token, n_concepts,
                    D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, BLOCK_D,
                )  # fmt: skip
                if WEIGHTED:
                    product *= tl.load(weight_ptr + head)
                scores += product
            if SOFTMAX:
                scores = tl.where((token < n_concepts)[None, :], scores * 1.4426950408889634, float("-inf"))
                p = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
                total += p / tl.sum(p, axis=1)[:, None]
            else:
                total += scores
    if (g >= 0) & leads:
        add_to_maps(maps, g, row, rows, token, n_concepts, total)


def _concept_map_triton(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    (batch, heads, n, e), c, full = output.shape, concepts.shape[2], output.dtype == torch.float32
    align, (outputs, of_concepts) = aligned(output, concepts)
    block_tokens = next_power_of_2(max(c, 16))
    block_rows = 16 if n <= 256 or full or block_tokens > 64 else 32
    with torch.cuda.device_of(output):
        _concept_map_kernel[(-(-n // block_rows), batch)](
            Maps(maps, *maps.stride()), outputs, of_concepts, weight_argument(head_weight, output), group.contiguous(),
            batch, heads, n, c, maps.shape[0], WEIGHTED=head_weight is not None, SOFTMAX=softmax, ALIGN=align, D=e,
            BLOCK_BATCH=next_power_of_2(batch), BLOCK_ROWS=block_rows, BLOCK_TOKENS=block_tokens,
            BLOCK_D=min(next_power_of_2(max(e, 16)), 32 if full else 64), num_warps=4,
            num_stages=1 if full or e > 64 else 2,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- registration


def _empty_output(query: Tensor, value: Tensor) -> Tensor:
    batch, heads, c, _ = query.shape
    return value.new_empty(batch, c, heads, value.shape[3]).transpose(1, 2)


def _concept_attention(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float
) -> Tensor:
    _check(query, key, value, image_key, image_value)
    out = _empty_output(query, value)
    if out.numel():
        triton = implementation("concept_attention", query) == "triton"
        run = _concept_attention_triton if triton else _concept_attention_cpu
        run(query, key, value, image_key, image_value, scale, out)
    return out


def _concept_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float
) -> Tensor:
    _check(query, key, value, image_key, image_value)
    return _empty_output(query, value)


def _concept_map(
    maps: Tensor, output: Tensor, concepts: Tensor, head_weight: Tensor | None, group: Tensor, softmax: bool
) -> None:
    _check_map(maps, output, concepts, head_weight, group, softmax)
    if maps.numel() and output.numel():
        run = _concept_map_triton if implementation("concept_map", output) == "triton" else _concept_map_cpu
        run(maps, output, concepts, head_weight, group, softmax)


register(
    "concept_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor image_key, Tensor image_value, float scale) -> Tensor",
    _concept_attention,
    fake=_concept_attention_fake,
)

register(
    "concept_map_",
    "(Tensor(a!) maps, Tensor output, Tensor concepts, Tensor? head_weight, Tensor group, bool softmax) -> ()",
    _concept_map,
    fake=_check_map,
    mutates=("maps",),
)


@register_flop_formula(registered.concept_attention)
def _concept_attention_flops(query: Any, key: Any, value: Any, image_key: Any, *_: Any, **__: Any) -> int:
    batch, heads, c, d = query
    return 2 * batch * heads * c * (c + image_key[2]) * (d + value[3])


@register_flop_formula(registered.concept_map_)
def _concept_map_flops(maps: Any, output: Any, concepts: Any, *_: Any, **__: Any) -> int:
    """Of all batch rows: what is counted is only known on the device."""
    batch, heads, n, e = output
    return 2 * batch * heads * n * concepts[2] * e
