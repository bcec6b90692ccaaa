"""The one key by which entries are ordered, and the k largest: for torch, and for Triton kernels.

A float's bits, read as an integer with the magnitude bits of negative numbers flipped, are ordered as the floats are.
Above the complement of the index they make an int64 without ties: whatever sorts such keys sorts by value, largest first,
and equal values by index, lowest first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import jit, tl

__all__ = [
    "entry_key",
    "entry_keys",
    "index_of",
    "largest",
    "largest_keys",
    "ordered",
    "ordered_bits",
    "relu_in_order",
    "relu_keys",
    "store_broken",
    "store_code",
]


def entry_keys(score: Tensor, index: Tensor) -> Tensor:
    """The keys of fp32 scores (no NaN; -0.0 equals 0.0) with indices below 2^31."""
    return (ordered_bits(score + 0.0).long() << 32) + (0x7FFFFFFF - index)


def ordered_bits(values: Tensor) -> Tensor:
    """int32 ordered as fp32 values are, -0.0 below 0.0. Of these bits, read as floats, it gives the floats' bits."""
    bits = values.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def largest(values: Tensor, k: int, signed: bool) -> Tensor:
    """[rows, k] positions of the k largest values of every row (signed: magnitudes), equal ones by position. NaN is not
    ordered here."""
    score = values.abs() if signed else values
    if values.dtype == torch.float64:  # no room beside 64 bits of value
        return (score + 0.0).sort(dim=1, descending=True, stable=True).indices[:, :k]
    keys = entry_keys(score, torch.arange(values.shape[1], device=values.device))
    return 0x7FFFFFFF - (keys.topk(k, dim=1).values & 0x7FFFFFFF)


def relu_in_order(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """A code [rows, k] after the ReLU: what it makes equal goes by index too."""
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order).clamp_(min=0)
    order = largest(values, values.shape[1], signed=False)
    return values.gather(1, order), indices.gather(1, order)


# ------------------------------------------------------------------------------------------------------------ Triton
# Here the lowest bit of a key is a sign (of values chosen by magnitude), so that a key is all that is kept of an entry.


@jit
def ordered(values):
    """int32 ordered as fp32 values are: -0.0 equals +0.0, NaN of either sign is the largest int32."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is +0.0
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@jit
def entry_key(ordered_value, index, negative):
    """int64 that sorts by `ordered_value`, equal ones by lower index first, and carries a sign in its lowest bit."""
    return (ordered_value.to(tl.int64) << 32) | ((0x3FFFFFFF - index) << 1 | negative).to(tl.int64)


@jit
def index_of(key):
    return 0x3FFFFFFF - ((key & 0xFFFFFFFF) >> 1)


@jit
def _merge_descending(x, ROWS: tl.constexpr, K: tl.constexpr, LOG_K: tl.constexpr):
    """Rows of [ROWS, K] that first fall and then rise (or the reverse), sorted: log K exchanges where a sort takes
    log K (log K + 1) / 2."""
    first = (tl.arange(0, 2) == 0)[None, :, None]
    for step in tl.static_range(LOG_K):
        pairs = tl.reshape(x, [ROWS << step, 2, K >> (step + 1)])
        high, low = tl.max(pairs, axis=1)[:, None, :], tl.min(pairs, axis=1)[:, None, :]
        x = tl.reshape(tl.where(first, high, low), [ROWS, K])
    return x


@jit
def largest_keys(keys, K: tl.constexpr, LOG_K: tl.constexpr, HALVINGS: tl.constexpr):
    """The K largest of [K << HALVINGS] keys, descending.

    Rows of K are sorted, odd ones ascending (as complements), so that the larger of each pair of neighbours in a
    descending and an ascending row are the K largest of both, and fall and rise. (tl.topk does this, from Triton 3.4.)
    """
    flip = -(tl.arange(0, 1 << HALVINGS) & 1).to(tl.int64)[:, None]  # 0 or -1: x ^ -1 is ~x
    x = tl.sort(tl.reshape(keys, [1 << HALVINGS, K]) ^ flip, dim=1, descending=True) ^ flip
    for level in tl.static_range(HALVINGS):
        x = tl.max(tl.reshape(x, [1 << (HALVINGS - level - 1), 2, K]), axis=1)
        flip = -(tl.arange(0, 1 << (HALVINGS - level - 1)) & 1).to(tl.int64)[:, None]
        x = _merge_descending(x ^ flip, 1 << (HALVINGS - level - 1), K, LOG_K) ^ flip
    return tl.reshape(x, [K])


@jit
def relu_keys(top, k, K: tl.constexpr):
    """A row's k largest `entry_key`s after the ReLU, descending: what it makes equal goes by index too."""
    inside = tl.arange(0, K) < k
    if tl.min(tl.where(inside, top, 0x7FFFFFFFFFFFFFFF), axis=0) >> 32 <= 0:  # elsewhere it changes nothing
        keys = entry_key(ordered(tl.maximum(_value_of(top), 0.0)), index_of(top), 0)
        top = tl.sort(tl.where(inside, keys, -1), descending=True)  # keys of values >= 0 are not negative
    return top


@jit
def _value_of(key):
    bits = (key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def store_code(top, values_ptr, indices_ptr, row, k, SIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Values and latents of one row from its k largest `entry_key`s, descending."""
    place = tl.arange(0, BLOCK_K)
    value = _value_of(top)  # [BLOCK_K]
    if SIGNED:
        value = tl.where((top & 1) == 1, -value, value)
    tl.store(values_ptr + row * k + place, value, mask=place < k)
    tl.store(indices_ptr + row * k + place, index_of(top).to(tl.int32), mask=place < k)


@jit
def store_broken(values_ptr, indices_ptr, row, k, BLOCK_K: tl.constexpr):
    """The code of one row with NaN."""
    place = tl.arange(0, BLOCK_K)
    tl.store(values_ptr + row * k + place, tl.full([BLOCK_K], float("nan"), tl.float32), mask=place < k)
    tl.store(indices_ptr + row * k + place, place, mask=place < k)
