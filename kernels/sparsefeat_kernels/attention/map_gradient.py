"""attention_map: the maps of `attention_map_` as a tensor of their own, with gradients for queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    check_kind,
    implementation,
    jit,
    next_power_of_2,
    ops,
    register,
    registered,
    sum_dtype,
    tl,
)
from ..flop_formulas import register_flop_formula
from .map_gradient_cpu import gradient_cpu, keeping, keeps
from .scores import (
    check_head_weight,
    check_query_and_key,
    check_tokens,
    dense_probabilities,
    head_weights,
    scale_of,
)
from .tiles import (
    Maps,
    aligned,
    head_product,
    load_tile,
    mask_argument,
    masked,
    softmax_start,
    softmax_step,
    tile_scores,
    weight_argument,
)

__all__ = ["attention_map"]


def attention_map(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    head_weight: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """The head-summed attention probabilities of every batch row, differentiable with respect to query and key.

        P[b, h, i, t] = softmax over t of (scale query[b, h, i] . key[b, h, t] + mask[b, h, i, t])
        maps[b, i, j] = sum over h of head_weight[h] P[b, h, i, tokens[j]]

    With G the gradient of a loss with respect to maps, put at the keys it belongs to (0 at the others):

        dS[b, h, i, t] = P[b, h, i, t] head_weight[h] (G[b, i, t] - sum over u of P[b, h, i, u] G[b, i, u])
        dquery[b, h, i] = scale sum over t of dS[b, h, i, t] key[b, h, t]
        dkey[b, h, t] = scale sum over i (and the query heads that read key head h) of dS[b, h, i, t] query[b, h, i]

    Attend-and-Excite, A-STAR and other guidance by maps take their gradients from here. The probabilities are made again
    in the backward pass, and neither pass holds [heads, n, t]; but on a CPU, where all of them and no mask take up to 4 MiB,
    plain torch keeps them.

    Args:
        query, key, scale, mask, head_weight, tokens: as in `attention_map_`. A token out of range has a map of zeros.

    Returns:
        [batch, n, t], or [batch, n, len(tokens)]; float32 (float64 for a float64 query).

    Products and sums are fp32 (fp64 for float64). On a GPU half-precision queries have dS rounded to their dtype before
    its two products, as in every flash attention, after a power of two is taken out of G so that it does not underflow.
    The same bits every run, of the same strides. Gradients have query's and key's dtype; those of a second order are refused by torch where
    probabilities are made again.

    Cost: forward as `attention_map_`; backward 6 batch heads n t d FLOPs as counted (a GPU makes the scores three times,
    10 in all; a CPU that keeps them 4). Scratch of the backward pass: 8 batch heads n bytes on a GPU, some MiB on a CPU.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes or devices; ValueError where mask or
    head_weight require a gradient, which they do not get.

    Example:
        >>> query, key = torch.tensor([[[[1.0]]]], requires_grad=True), torch.tensor([[[[0.0], [1.0]]]])
        >>> maps = attention_map(query, key)
        >>> maps[0, 0, 1].backward()
        >>> query.grad  # p (1 - p) of the second key
        tensor([[[[0.1966]]]])
    """
    for name, given in (("mask", mask), ("head_weight", head_weight)):
        check_kind(name, "Optional[Tensor]", given)
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, and attention_map gives one to query and key only; detach it"
            )
    scale = scale_of(query, scale)
    check_kind("key", "Tensor", key)
    if mask is None and keeps(query, key):
        check_query_and_key("attention_map", query, key, None)
        check_head_weight(head_weight, query)
        check_tokens(tokens, query)
        return keeping(query, key, scale, head_weight, tokens)
    return ops.attention_map(query, key, scale, mask, head_weight, tokens)


def reference(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, head_weight: Tensor | None, tokens: Tensor | None
) -> Tensor:
    """The meaning of attention_map, and through autograd of its gradient: dense, any dtype."""
    summed = torch.einsum(
        "bhnt,h->bnt", dense_probabilities(query, key, scale, mask)[1], head_weights(head_weight, query)
    )
    if tokens is None:
        return summed
    owned = (tokens >= 0) & (tokens < key.shape[2])
    return torch.where(owned, summed[..., torch.where(owned, tokens, 0)], 0)


def _slots(grad: Tensor, tokens: Tensor | None, n_tokens: int) -> tuple[Tensor, Tensor | None]:
    """The gradient with what belongs to one key in one column, and for each key its column (-1: it has none)."""
    if tokens is None:
        return grad, None
    places = torch.where((tokens >= 0) & (tokens < n_tokens), tokens, n_tokens).long()
    first = (places[:, None] == places[None, :]).int().argmax(1)  # of those that name the same key
    slots = torch.full((n_tokens + 1,), -1, dtype=torch.int64, device=grad.device).scatter_(0, places, first)
    return torch.zeros_like(grad).index_add_(2, first, grad), slots[:n_tokens]


# ------------------------------------------------------------------------------------------------------------ Triton
# Two kernels. Rows: a flash loop over the keys leaves the log-sum-exp and the sum of P G of a block of rows, a second
# one their gradient. Keys: a block of them goes through all rows and all heads that read it. No program writes where
# another does.


@jit
def _finite_or_zero(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0).to(x.dtype)


@jit
def _load_grad(grad, slots_ptr, b, row, rows, token, n_tokens, SELECTED: tl.constexpr):
    """The gradient of the maps at these rows and keys; 0 where a key has no map."""
    if SELECTED:
        column = tl.load(slots_ptr + token, mask=token < n_tokens, other=-1)
        there = column >= 0
    else:
        column = token
        there = token < n_tokens
    ptrs = grad.ptr + b * grad.group + row[:, None] * grad.row + column[None, :] * grad.token
    return tl.load(ptrs, mask=(row < rows)[:, None] & there[None, :], other=0.0)


@jit
def _unit(factor, weight_ptr, head, WEIGHTED: tl.constexpr):
    """What the gradient of the maps is multiplied by for this head."""
    unit = 1 / factor
    if WEIGHTED:
        unit *= tl.load(weight_ptr + head)
    return unit


@jit
def _attention_gradient_rows_kernel(
    grad,
    query,
    key,
    grad_query_ptr,
    lse_ptr,
    dot_ptr,
    mask,
    weight_ptr,
    slots_ptr,
    factor_ptr,
    heads,
    rows,
    n_tokens,
    scale,
    heads_per_key,
    WEIGHTED: tl.constexpr,
    SELECTED: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK_D: tl.constexpr,
):
    """A block of rows of one head: log-sum-exp (in powers of two), sum of P G w, and the gradient of the query."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    key_head = head // heads_per_key
    factor = tl.load(factor_ptr)
    unit = _unit(factor, weight_ptr, head, WEIGHTED)
    column = tl.arange(0, BLOCK_D)
    highest, sums = softmax_start(BLOCK_ROWS)
    dots = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        scores = head_product(
            query, key, b, head, key_head, row, rows, token, n_tokens, D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, CHUNK_D
        )
        scores *= scale * 1.4426950408889634
        scores = masked(scores, mask, b, head, row, rows, token, n_tokens, MASK)
        g = _load_grad(grad, slots_ptr, b, row, rows, token, n_tokens, SELECTED)
        p, shrink, _, highest, sums = softmax_step(scores, highest, sums)
        dots = dots * shrink + tl.sum(p * (g * unit), axis=1)
    sums = tl.where(sums == 0, 1.0, sums)  # every key is masked: highest is -inf, and so the probabilities are 0
    lse = tl.where(highest == float("-inf"), float("inf"), highest + tl.log2(sums))
    dots /= sums
    at = (b * heads + head) * rows + row
    tl.store(lse_ptr + at, lse, mask=row < rows)
    tl.store(dot_ptr + at, dots, mask=row < rows)
    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in range(0, n_tokens, BLOCK_TOKENS):
        token = start + tl.arange(0, BLOCK_TOKENS).to(tl.int64)
        scores = head_product(
            query, key, b, head, key_head, row, rows, token, n_tokens, D, ALIGN, BLOCK_ROWS, BLOCK_TOKENS, CHUNK_D
        )
        scores *= scale * 1.4426950408889634
        scores = masked(scores, mask, b, head, row, rows, token, n_tokens, MASK)
        g = _load_grad(grad, slots_ptr, b, row, rows, token, n_tokens, SELECTED)
        d_scores = tl.exp2(scores - lse[:, None]) * (g * unit - dots[:, None])
        k = load_tile(key, b, key_head, token, n_tokens, column, D, ALIGN)
        total = tl.dot(d_scores.to(k.dtype), _finite_or_zero(k), total, input_precision="ieee")
    ptrs = grad_query_ptr + at[:, None] * D + column[None, :]
    inside = (row < rows)[:, None] & (column < D)[None, :]
    tl.store(ptrs, (total * (factor * scale)).to(grad_query_ptr.dtype.element_ty), mask=inside)


@jit
def _attention_gradient_keys_kernel(
    grad,
    query,
    key,
    grad_key_ptr,
    lse_ptr,
    dot_ptr,
    mask,
    weight_ptr,
    slots_ptr,
    factor_ptr,
    heads,
    rows,
    n_tokens,
    scale,
    heads_per_key,
    WEIGHTED: tl.constexpr,
    SELECTED: tl.constexpr,
    MASK: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A block of keys of one key head: the gradient from all rows of all heads that read it, in order."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    key_head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    factor = tl.load(factor_ptr)
    column = tl.arange(0, BLOCK_D)
    k = load_tile(key, b, key_head, token, n_tokens, column, D, ALIGN)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_D], tl.float32)
    for shared in range(0, heads_per_key):
        head = key_head * heads_per_key + shared
        unit = _unit(factor, weight_ptr, head, WEIGHTED)
        for start in range(0, rows, BLOCK_ROWS):
            row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            at = (b * heads + head) * rows + row
            q = load_tile(query, b, head, row, rows, column, D, ALIGN)
            scores = tile_scores(q, k, scale * 1.4426950408889634, mask, b, head, row, rows, token, n_tokens, MASK)
            g = _load_grad(grad, slots_ptr, b, row, rows, token, n_tokens, SELECTED)
            lse = tl.load(lse_ptr + at, mask=row < rows, other=float("inf"))
            dots = tl.load(dot_ptr + at, mask=row < rows, other=0.0)
            d_scores = tl.exp2(scores - lse[:, None]) * (g * unit - dots[:, None])
            # Past the last row there is no query, but 0 times a NaN or an infinity of the key is NaN.
            d_scores = tl.where((row < rows)[:, None], d_scores, 0.0).to(q.dtype)
            total = tl.dot(tl.trans(d_scores), _finite_or_zero(q), total, input_precision="ieee")
    at_key = (b * (heads // heads_per_key) + key_head) * n_tokens + token
    ptrs = grad_key_ptr + at_key[:, None] * D + column[None, :]
    inside = (token < n_tokens)[:, None] & (column < D)[None, :]
    tl.store(ptrs, (total * (factor * scale)).to(grad_key_ptr.dtype.element_ty), mask=inside)


def _power_of_two(grad: Tensor) -> Tensor:
    """[] fp32: the power of two above the largest number of the gradient, 1 for a gradient without a finite one."""
    largest = torch.nan_to_num(grad.abs().amax(), nan=0.0, posinf=0.0)
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent), 1.0)


def _blocks(full: bool, block_d: int) -> tuple[int, int, int]:
    """Rows, keys and warps of a program: as many as spill no register on sm_80 and sm_90."""
    if full:
        return 16, 16, 4 if block_d <= 64 else 8
    return (32, 32, 4) if block_d <= 128 else (16, 32, 4 if block_d <= 256 else 8)


def _gradient_triton(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (batch, heads, n, d), (_, key_heads, n_tokens, _) = query.shape, key.shape
    grad_query, grad_key = query.new_empty(query.shape), key.new_empty(key.shape)
    lse, dots = (query.new_empty(batch, heads, n, dtype=torch.float32) for _ in range(2))
    bias, is_masked = mask_argument(mask, query, key)
    align, (queries, keys) = aligned(query, key)
    block_d = next_power_of_2(max(d, 16))
    block_rows, block_tokens, warps = _blocks(query.dtype == torch.float32, block_d)
    given = (lse, dots, bias, weight_argument(head_weight), grad if slots is None else slots)
    sizes = (_power_of_two(grad), heads, n, n_tokens, scale, heads // key_heads)
    grads = Maps(grad, *grad.stride())
    options = {
        "WEIGHTED": head_weight is not None, "SELECTED": slots is not None, "MASK": is_masked, "ALIGN": align, "D": d,
        "BLOCK_ROWS": block_rows, "BLOCK_TOKENS": block_tokens, "BLOCK_D": block_d,
        "num_warps": warps, "num_stages": 1,
    }  # fmt: skip
    chunk = min(block_d, 32 if query.dtype == torch.float32 else 64)
    with torch.cuda.device_of(query):
        _attention_gradient_rows_kernel[(-(-n // block_rows), heads, batch)](
            grads, queries, keys, grad_query, *given, *sizes, **options, CHUNK_D=chunk
        )
        _attention_gradient_keys_kernel[(-(-n_tokens // block_tokens), key_heads, batch)](
            grads, queries, keys, grad_key, *given, *sizes, **options
        )
    return grad_query, grad_key


# ------------------------------------------------------------------------------------------------------- registration


def _maps_of(query: Tensor, key: Tensor, tokens: Tensor | None) -> Tensor:
    check_query_and_key("attention_map", query, key, None)
    selected = key.shape[2] if tokens is None else tokens.numel()
    return torch.zeros(query.shape[0], query.shape[2], selected, dtype=sum_dtype(query), device=query.device)


def _attention_map(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, head_weight: Tensor | None, tokens: Tensor | None
) -> Tensor:
    maps = _maps_of(query, key, tokens)
    group = torch.arange(query.shape[0], device=query.device)
    ops.attention_map_(maps, query, key, scale, mask, head_weight, group, tokens)
    return maps


def _check_gradient(grad: Tensor, query: Tensor, key: Tensor, tokens: Tensor | None) -> None:
    check_query_and_key("attention_map_gradient", query, key, None)
    wanted = (query.shape[0], query.shape[2], key.shape[2] if tokens is None else tokens.shape[0])
    if tuple(grad.shape) != wanted:
        raise ValueError(f"grad must be {wanted}, as the maps are, got shape {tuple(grad.shape)}")
    if grad.dtype != sum_dtype(query):
        raise TypeError(f"grad must be {sum_dtype(query)} for a query of {query.dtype}, got {grad.dtype}")


def _gradient(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_gradient(grad, query, key, tokens)
    if grad.numel() == 0 or query.numel() == 0 or key.numel() == 0:
        return query.new_zeros(query.shape), key.new_zeros(key.shape)
    grad, slots = _slots(grad, tokens, key.shape[2])
    by_triton = implementation("attention_map_gradient", query) == "triton"
    run = _gradient_triton if by_triton else gradient_cpu
    return run(grad, query, key, scale, mask, head_weight, slots)


def _gradient_fake(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_gradient(grad, query, key, tokens)
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, ctx.scale, mask, head_weight, tokens = inputs
    ctx.save_for_backward(query, key, mask, head_weight, tokens)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, mask, head_weight, tokens = ctx.saved_tensors
    grad_query, grad_key = ops.attention_map_gradient(grad, query, key, ctx.scale, mask, head_weight, tokens)
    return grad_query, grad_key, None, None, None, None


register(
    "attention_map",
    "(Tensor query, Tensor key, float scale, Tensor? mask, Tensor? head_weight, Tensor? tokens) -> Tensor",
    _attention_map,
    fake=_attention_map,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "attention_map_gradient",
    "(Tensor grad, Tensor query, Tensor key, float scale, Tensor? mask, Tensor? head_weight, Tensor? tokens) "
    "-> (Tensor, Tensor)",
    _gradient,
    fake=_gradient_fake,
)


@register_flop_formula(registered.attention_map)
def _attention_map_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    batch, heads, n, d = query
    return 2 * batch * heads * n * key[2] * d


@register_flop_formula(registered.attention_map_gradient)
def _attention_map_gradient_flops(grad: Any, query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Three products of the attention's size: the scores, and both gradients."""
    batch, heads, n, d = query
    return 6 * batch * heads * n * key[2] * d
