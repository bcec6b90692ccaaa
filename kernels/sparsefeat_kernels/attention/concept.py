"""concept_attention: queries that nobody wrote into the prompt, over themselves and an image."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

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
from ..flop_formulas import register_flop_formula
from ..threads import conducted, each, shares, threads, together
from .scores import BLOCK_BYTES, check_device, check_query_and_key, scale_of
from .tiles import (
    LOG2_E,
    aligned,
    heads_of,
    load_tile,
    softmax_start,
    softmax_step,
    store_tile,
    tile_scores,
)

__all__ = ["concept_attention"]


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
    scale = scale_of(query, scale)
    return ops.concept_attention(query, key, value, image_key, image_value, scale)


def reference(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float
) -> Tensor:
    """The meaning of concept_attention: dense, any dtype."""
    keys, values = torch.cat([key, image_key], dim=2), torch.cat([value, image_value], dim=2)
    return (torch.einsum("bhcd,bhtd->bhct", query, keys) * scale).softmax(-1) @ values


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


# --------------------------------------------------------------------------------------------------------------- CPU


@conducted
def _concept_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, image_key: Tensor, image_value: Tensor, scale: float, out: Tensor
) -> None:
    batch, heads, c, _ = query.shape
    wide, n = sum_dtype(query), image_key.shape[2]

    def joined(piece: tuple[slice, slice]) -> None:
        """Two attentions of torch's, joined by their log-sum-exps."""
        (of_own, own_lse), (of_image, image_lse) = (
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[piece], k[piece], v[piece], scale=scale)
            for q, k, v in both
        )
        if not (own_lse.all() and image_lse.all()):  # 0: torch's answer also where every score is -inf
            for b, h in itertools.product(range(batch), range(heads)[piece[1]]):
                dense((b, slice(h, h + 1)))
            return
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
        # Torch's takes every other stride as it is, but the last for 1.
        q, *others = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, image_key, image_value))
        both = (q, *others[:2]), (q, *others[2:])
        together(each(joined, [(slice(None), of_heads) for of_heads in shares(heads, threads())]))
        return
    most = block_bytes(query, BLOCK_BYTES) // threads()
    blocks = row_chunks(heads, c * (c + n) * wide.itemsize, most)
    if len(blocks) < threads():
        blocks = shares(heads, threads())
    together(each(dense, itertools.product(range(batch), blocks)))


# ------------------------------------------------------------------------------------------------------------ Triton
# A program of concept_attention takes a part of the keys of one head: a head alone, of 24, would leave most of a card
# idle. What it leaves (the largest score, the sum of exponentials, the sum of values) is joined in order.

KEYS_A_PART = 512


@jit
def _concept_attention_kernel(
    query,
    key,
    value,
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
        scores = tile_scores(q, k, scale, None, b, head, row, rows, token, n_tokens, 0)
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
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mine, its = tl.exp2(highest - base), tl.exp2(its_highest - base)
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
    row_blocks = -(-c // block_rows)
    warps = 8 if full else 4  # 720 instructions a thread for 1,170 of 4 warps, which spill on sm_80 under Triton 3.6
    with torch.cuda.device_of(query):
        for k, v, before, its_parts in ((key, value, 0, own), (image_key, image_value, own, of_image)):
            if its_parts:
                align, (queries, keys, values) = aligned(query, k, v)
                _concept_attention_kernel[(row_blocks * its_parts, heads, batch)](
                    queries, keys, values, partial, sums, heads, c, k.shape[2], before, its_parts, parts,
                    scale * LOG2_E, ALIGN=align, D=d, D_VALUE=e, PART=KEYS_A_PART,
                    BLOCK_ROWS=block_rows, BLOCK_TOKENS=16 if full else 32, BLOCK_D=block_d, BLOCK_VALUE=block_value,
                    num_warps=warps, num_stages=1 if full or max(d, e) > 160 else 2,
                )  # fmt: skip
        _concept_attention_join_kernel[(row_blocks, heads, batch)](
            heads_of(out), partial, sums, heads, c, parts, D_VALUE=e, BLOCK_ROWS=block_rows,
            BLOCK_VALUE=block_value, num_warps=4,
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


register(
    "concept_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor image_key, Tensor image_value, float scale) -> Tensor",
    _concept_attention,
    fake=_concept_attention_fake,
)


@register_flop_formula(registered.concept_attention)
def _concept_attention_flops(query: Any, key: Any, value: Any, image_key: Any, *_: Any, **__: Any) -> int:
    batch, heads, c, d = query
    return 2 * batch * heads * c * (c + image_key[2]) * (d + value[3])
