"""What the attention kernels share: how a tensor is handed to them, and the scores and the softmax of one tile.

In every kernel `row` and `token` are the int64 numbers of a tile's rows and keys, of `rows` and `n_tokens`; scores are in
powers of two. A tensor comes as a tuple of its pointer and strides.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from torch import Tensor

from ..dispatch import jit, tl
from .scores import additive

__all__ = ["Heads", "Maps", "aligned", "heads_of", "mask_argument", "weight_argument"]

LOG2_E = math.log2(math.e)


class Heads(NamedTuple):
    """A tensor [batch, heads, rows, columns] in a kernel. Strides count ALIGN elements, that of columns one."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Maps(NamedTuple):
    """A tensor [groups, rows, tokens] in a kernel."""

    ptr: Any
    group: Any
    row: Any
    token: Any


NO_MASK, MASK_OF_KEYS, MASK_OF_PAIRS = 0, 1, 2


def heads_of(tensor: Tensor) -> Heads:
    """Of [batch, heads, rows, columns] or, of one column, [batch, heads, rows]; ALIGN is 1."""
    batch, head, row, *column = tensor.stride()
    return Heads(tensor, batch, head, row, column[0] if column else 0)


def aligned(*tensors: Tensor) -> tuple[int, list[Heads]]:
    """ALIGN, the number of elements that every row of a head of these tensors of one dtype is aligned to, and they.

    Multiplied by it again in a kernel strides show the compiler that loads may be 128 bits wide. A head of 40 starts at
    any multiple of 80 bytes, which the usual hint, divisibility by 16 elements, does not cover.
    """
    pointers = 0
    for tensor in tensors:
        pointers |= tensor.data_ptr()
    most = 1 if pointers % 16 else 16 // tensors[0].itemsize
    align, strides = _counted(most, tuple([tensor.stride() for tensor in tensors]))
    return align, [Heads(tensor, *own) for tensor, own in zip(tensors, strides, strict=True)]


@functools.lru_cache(maxsize=1024)
def _counted(most: int, strides: tuple[tuple[int, ...], ...]) -> tuple[int, list[tuple[int, ...]]]:
    """ALIGN, at most `most`, and the strides that count it."""
    align = most if all(own[3] == 1 for own in strides) else 1
    align = math.gcd(align, *(stride for own in strides for stride in own[:3]))
    return align, [(*(stride // align for stride in own[:3]), own[3]) for own in strides]


def mask_argument(mask: Tensor | None, query: Tensor, key: Tensor) -> tuple[Heads | None, int]:
    """The mask, additive and expanded, and MASK."""
    bias = additive(mask, query, key)
    if bias is None:
        return None, NO_MASK
    return heads_of(bias), MASK_OF_KEYS if bias.stride(2) == 0 or bias.shape[2] == 1 else MASK_OF_PAIRS


def weight_argument(head_weight: Tensor | None) -> Tensor | None:
    """What a kernel reads where WEIGHTED."""
    return None if head_weight is None else head_weight.float().contiguous()


# Head dims are padded to what a matrix unit takes, 16 at least, in chunks of BLOCK_D: 40 becomes 64, 72 and 112 two
# chunks of 64, 160 three.


@jit
def load_tile(of, b, head, row, rows, column, D: tl.constexpr, ALIGN: tl.constexpr):
    """[rows of the tile, columns of the tile] of one head; zeros outside [rows, D]."""
    ptr = of.ptr + (b * of.batch + head * of.head) * ALIGN
    ptrs = ptr + row[:, None] * (of.row * ALIGN) + column.to(tl.int64)[None, :] * of.column
    return tl.load(ptrs, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)


@jit
def load_rows(of, b, head, row, rows, other):
    """[rows of the tile] of a tensor without columns, `other` past the last."""
    return tl.load(of.ptr + b * of.batch + head * of.head + row * of.row, mask=row < rows, other=other)


@jit
def store_tile(of, b, head, row, rows, column, D: tl.constexpr, values):
    ptrs = of.ptr + b * of.batch + head * of.head + row[:, None] * of.row + column[None, :] * of.column
    tl.store(ptrs, values.to(of.ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < D)[None, :])


@jit
def add_to_maps(maps, g, row, rows, token, n_tokens, more):
    ptrs = maps.ptr + g * maps.group + row[:, None] * maps.row + token[None, :] * maps.token
    inside = (row < rows)[:, None] & (token < n_tokens)[None, :]
    tl.store(ptrs, tl.load(ptrs, mask=inside) + more, mask=inside)


@jit
def head_product(
    query, key, b, head, key_head, row, rows, token, n_tokens,
    D: tl.constexpr, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """query key^T of one head, [BLOCK_ROWS, BLOCK_TOKENS] fp32, in chunks of columns."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = load_tile(query, b, head, row, rows, column, D, ALIGN)
        k = load_tile(key, b, key_head, token, n_tokens, column, D, ALIGN)
        total = tl.dot(q, tl.trans(k), total, input_precision="ieee")
    return total


@jit
def _biased(scores, bias):
    return tl.where(bias < -1e30, float("-inf"), scores + bias * 1.4426950408889634)


@jit
def masked(scores, mask, b, head, row, rows, token, n_tokens, MASK: tl.constexpr):
    """Scores with the mask: -inf where it says so (whatever the key holds, NaN too) and where there is no token."""
    if MASK != 0:
        ptr = mask.ptr + b * mask.batch + head * mask.head
    if MASK == 1:
        bias = tl.load(ptr + token * mask.column, mask=token < n_tokens, other=float("-inf"))
        scores = _biased(scores, bias.to(tl.float32)[None, :])
    if MASK == 2:
        ptrs = ptr + row[:, None] * mask.row + token[None, :] * mask.column
        bias = tl.load(ptrs, mask=(row < rows)[:, None] & (token < n_tokens)[None, :], other=0.0).to(tl.float32)
        scores = _biased(scores, bias)
    return tl.where((token < n_tokens)[None, :], scores, float("-inf"))


@jit
def tile_scores(q, k, scale, mask, b, head, row, rows, token, n_tokens, MASK: tl.constexpr):
    """[rows of the tile, keys of the tile], of whole heads that are loaded already."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return masked(scores, mask, b, head, row, rows, token, n_tokens, MASK)


@jit
def softmax_start(BLOCK_ROWS: tl.constexpr):
    """The largest score and the sum of exponentials of no key."""
    return tl.full([BLOCK_ROWS], float("-inf"), tl.float32), tl.zeros([BLOCK_ROWS], tl.float32)


@jit
def softmax_step(scores, highest, sums):
    """One tile of keys: its exponentials p of differences to `base`, the factor for what was summed before, and the
    largest score and the sum of exponentials with this tile. `base` is the largest score, 0 where that is -inf."""
    higher = tl.maximum(highest, tl.max(scores, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(highest - base)
    p = tl.exp2(scores - base[:, None])
    return p, shrink, base, higher, sums * shrink + tl.sum(p, axis=1)


@jit
def group_of(group_ptr, batch_row, groups, BLOCK_BATCH: tl.constexpr):
    """A batch row's group (-1: not accumulated), and whether it is the first row of its group.

    The first row's program adds up all rows of the group, in order, so that no two programs write to one place.
    """
    g = tl.load(group_ptr + batch_row).to(tl.int64)
    g = tl.where((g >= 0) & (g < groups), g, -1)
    other = tl.arange(0, BLOCK_BATCH)
    before = tl.load(group_ptr + other, mask=other < batch_row, other=-1).to(tl.int64)
    return g, tl.sum(((before == g) & (other < batch_row)).to(tl.int32), axis=0) == 0
