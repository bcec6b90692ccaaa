"""What the attention ops share: their arguments, and the scores of queries and keys, a block or a tile at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..dispatch import block_bytes, implementation, jit, sum_dtype, tl

__all__ = ["arguments", "score_blocks"]

# One block of scores on the CPU path: with the block of probabilities beside it, what two cores' L2 holds.
BLOCK_BYTES = 1 << 20
# A bias below this is a mask: the lowest number of fp32 or bf16 is a usual way to write one, and no score and no
# logarithm of a sum can be told from it once it is added.
MASKED = -1e30
LOG2_E = math.log2(math.e)
# Batch rows and heads are the second and third dimension of a GPU's grid, which end here.
LARGEST_GRID = 65535


# ---------------------------------------------------------------------------------------------------------- arguments


def check_query_and_key(op: str, query: Tensor, key: Tensor, mask: Tensor | None) -> None:
    if query.dim() != 4 or query.shape[3] == 0:
        raise ValueError(f"query must be [batch, heads, n, d] with d > 0, got shape {tuple(query.shape)}")
    if query.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"query must be float32, float64, bfloat16 or float16, got {query.dtype}")
    batch, heads, n, d = query.shape
    if max(batch, heads) > LARGEST_GRID and implementation(op, query) == "triton":
        raise ValueError(
            f"query must have at most {LARGEST_GRID} batch rows and heads on a GPU, got shape {tuple(query.shape)}; "
            f"split the batch"
        )
    if key.dim() != 4 or key.shape[0] != batch or key.shape[3] != d:
        raise ValueError(f"key must be [{batch}, key heads, t, {d}] to match query, got shape {tuple(key.shape)}")
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key must have a number of heads that divides query's {heads}, got {key.shape[1]}")
    if key.dtype != query.dtype:
        raise TypeError(f"key must have query's dtype {query.dtype}, got {key.dtype}; cast one of them")
    check_device("key", key, query)
    if mask is None:
        return
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"mask must be bool (True is kept) or floating point (added to the scores), got {mask.dtype}")
    full = (batch, heads, n, key.shape[2])
    if tuple(mask.shape) != (batch, key.shape[2]) and not (
        mask.dim() == 4 and all(size in (1, of) for size, of in zip(mask.shape, full, strict=True))
    ):
        raise ValueError(
            f"mask must be [batch, t] = {(batch, key.shape[2])}, or of four dimensions that broadcast to "
            f"[batch, heads, n, t] = {full}, got shape {tuple(mask.shape)}"
        )
    check_device("mask", mask, query)


def check_accumulator(
    name: str, sums: Tensor, shape: tuple[int, ...], query: Tensor, head_weight: Tensor | None, group: Tensor
) -> None:
    """`sums` is [groups, *shape] and may be written in place; head_weight and group fit the query."""
    if sums.dim() != 1 + len(shape) or tuple(sums.shape[1:]) != shape:
        sizes = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name} must be [groups, {sizes}] to match query and key, got shape {tuple(sums.shape)}")
    if sums.dtype != sum_dtype(query):
        raise TypeError(f"{name} must be {sum_dtype(query)} for a query of {query.dtype}, got {sums.dtype}")
    if any(stride == 0 and size > 1 for stride, size in zip(sums.stride(), sums.shape, strict=True)):
        raise ValueError(f"{name} is written in place and must not be expanded, got strides {tuple(sums.stride())}")
    check_device(name, sums, query)
    batch, heads = query.shape[:2]
    if group.dim() != 1 or group.shape[0] != batch:
        raise ValueError(f"group must have shape ({batch},), one entry a batch row, got {tuple(group.shape)}")
    if group.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group must be int32 or int64, got {group.dtype}")
    check_device("group", group, query)
    if head_weight is not None:
        if tuple(head_weight.shape) != (heads,):
            raise ValueError(f"head_weight must have shape ({heads},), got {tuple(head_weight.shape)}")
        if not head_weight.is_floating_point():
            raise TypeError(f"head_weight must be floating point, got {head_weight.dtype}")
        check_device("head_weight", head_weight, query)


def check_lse(lse: Tensor, query: Tensor) -> None:
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must be [batch, heads, n] = {tuple(query.shape[:3])}, got shape {tuple(lse.shape)}")
    if lse.dtype != sum_dtype(query):
        raise TypeError(
            f"lse must be {sum_dtype(query)} for a query of {query.dtype}, got {lse.dtype}; half precision is too coarse"
        )
    check_device("lse", lse, query)


def check_device(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}; move one of them")


def arguments(query: Tensor, scale: float | None, group: Tensor | None) -> tuple[float, Tensor]:
    """The defaults: scale 1 / sqrt(d), and batch row b in group b."""
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    return scale, torch.arange(query.shape[0], device=query.device) if group is None else group


def additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as a bias, expanded (not copied) to [batch, heads, n, t]: -inf where nothing may be attended to."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        kept = torch.zeros((), dtype=sum_dtype(query), device=mask.device)
        mask = torch.where(mask, kept, -torch.inf)
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    return mask.expand(*query.shape[:3], key.shape[2])


def dense_probabilities(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores and probabilities [batch, heads, n, t], for the references: nothing is saved."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("bhnd,bhtd->bhnt", query, key) * scale
    bias = additive(mask, query, key)
    if bias is not None:
        scores = torch.where(bias < MASKED, -torch.inf, scores + bias)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    return scores, torch.where(dead, 0, scores.softmax(-1))


# --------------------------------------------------------------------------------------------------------------- CPU


def score_blocks(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, of_cpu: int = BLOCK_BYTES
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The scores of one batch row, block by block, in a buffer that every block reuses.

    query [heads, n, d], key [key heads, t, d], mask a bias [heads, n, t] or None. Yields (heads, rows, scores
    [heads of the block, rows of the block, t]); a block is `block_bytes` of `of_cpu` or, if that is more, one row of one
    head.
    """
    (heads, n, _), tokens, dtype = query.shape, key.shape[1], sum_dtype(query)
    most = block_bytes(query, of_cpu)
    room = max(1, most // (dtype.itemsize * max(tokens, 1)))  # rows of one head in a block
    row_step = min(n, room, max(64, room // heads))  # below 64 rows a product runs at half speed: fewer heads instead
    head_step = min(heads, max(1, room // row_step)) if n else heads
    shared = heads // key.shape[0]
    buffer = query.new_empty(head_step * row_step * tokens, dtype=dtype)
    for first_head in range(0, heads, head_step):
        block = slice(first_head, min(first_head + head_step, heads))
        k = key[block] if shared == 1 else key[[h // shared for h in range(block.start, block.stop)]]
        k = k.to(dtype).transpose(1, 2)  # [heads of the block, d, t]
        for first_row in range(0, n, row_step):
            rows = slice(first_row, min(first_row + row_step, n))
            shape = (block.stop - block.start, rows.stop - rows.start, tokens)
            scores = buffer[: math.prod(shape)].view(shape)
            scores.baddbmm_(query[block, rows].to(dtype), k, beta=0, alpha=scale)
            if mask is not None:
                bias = mask[block, rows].to(dtype)
                scores.add_(bias).masked_fill_(bias < MASKED, -torch.inf)  # whatever the key holds, NaN too
            yield block, rows, scores


def head_weights(head_weight: Tensor | None, query: Tensor) -> Tensor:
    dtype = sum_dtype(query)
    return query.new_ones(query.shape[1], dtype=dtype) if head_weight is None else head_weight.to(dtype)


def counted_rows(group: Tensor, groups: int) -> list[tuple[int, Tensor]]:
    """(batch row, its group) of the rows that are accumulated, in order; on a GPU, where the host would have to wait for
    the answer, of all rows."""
    if group.device.type != "cpu":
        return list(enumerate(group.unbind())) if groups else []
    return [(row, g) for row, g in enumerate(group.unbind()) if 0 <= int(g) < groups]


def add_to_group(sums: Tensor, group: Tensor, more: Tensor) -> None:
    """sums[group] += more, in place; nothing for a group that is none of them."""
    if group.device.type == "cpu":
        sums[int(group)] += more
        return
    counted = (group >= 0) & (group < len(sums))
    at = torch.where(counted, group, 0).long().view(1)
    sums.index_add_(0, at, torch.where(counted, more, 0).to(sums.dtype)[None])


# ------------------------------------------------------------------------------------------------------------ Triton
# Head dims are padded to what a matrix unit takes, 16 at least, in chunks of BLOCK_D: 40 becomes 64, 72 and 112 two
# chunks of 64, 160 three. Strides come divided by ALIGN, the number of elements that every row of a head is aligned to:
# multiplied by it again in the kernel they show the compiler that loads may be 128 bits wide (a head of 40 starts at
# any multiple of 80 bytes, which the usual hint, divisibility by 16 elements, does not cover).

NO_MASK, MASK_OF_KEYS, MASK_OF_PAIRS = 0, 1, 2


def aligned(*tensors: Tensor) -> tuple[int, list[tuple[int, ...]]]:
    """ALIGN, and the strides of 4-dimensional tensors of one dtype, all but the last divided by it."""
    align = 16 // tensors[0].dtype.itemsize
    for tensor in tensors:
        if tensor.stride(3) != 1 or tensor.data_ptr() % 16:
            align = 1
        align = math.gcd(align, *tensor.stride()[:3])
    return align, [(*(stride // align for stride in t.stride()[:3]), t.stride(3)) for t in tensors]


def mask_arguments(mask: Tensor | None, query: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """Pointer, strides and MASK of an additive mask [batch, heads, n, t]."""
    if mask is None:
        return query, (0, 0, 0, 0), NO_MASK
    return mask, mask.stride(), MASK_OF_KEYS if mask.stride(2) == 0 or mask.shape[2] == 1 else MASK_OF_PAIRS


@jit
def load_heads(ptr, row, rows, column, stride_row, stride_d, D: tl.constexpr, ALIGN: tl.constexpr):
    """[rows of the tile, columns of the tile] of one head; zeros outside [rows, D]."""
    ptrs = ptr + row[:, None] * (stride_row * ALIGN) + column.to(tl.int64)[None, :] * stride_d
    return tl.load(ptrs, mask=(row < rows)[:, None] & (column < D)[None, :], other=0.0)


@jit
def score_product(
    query_ptr,
    key_ptr,
    row,
    rows,
    token,
    tokens,
    stride_query_row,
    stride_query_d,
    stride_key_token,
    stride_key_d,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """query key^T of one head, [BLOCK_ROWS, BLOCK_TOKENS] fp32."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
    for start in tl.static_range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        q = load_heads(query_ptr, row, rows, column, stride_query_row, stride_query_d, D, ALIGN)
        k = load_heads(key_ptr, token, tokens, column, stride_key_token, stride_key_d, D, ALIGN)
        total = tl.dot(q, tl.trans(k), total, input_precision="ieee")
    return total


@jit
def _biased(scores, bias):
    return tl.where(bias < -1e30, float("-inf"), scores + bias * 1.4426950408889634)


@jit
def masked_scores(
    scores,
    mask_ptr,
    row,
    rows,
    token,
    tokens,
    stride_mask_row,
    stride_mask_token,
    MASK: tl.constexpr,
):
    """Scores [rows of the tile, tokens of the tile], in powers of two, with the mask: -inf where it says so (whatever
    the key holds, NaN too) and where there is no token."""
    if MASK == 1:
        bias = tl.load(mask_ptr + token * stride_mask_token, mask=token < tokens, other=float("-inf"))
        scores = _biased(scores, bias.to(tl.float32)[None, :])
    if MASK == 2:
        ptrs = mask_ptr + row[:, None] * stride_mask_row + token[None, :] * stride_mask_token
        bias = tl.load(ptrs, mask=(row < rows)[:, None] & (token < tokens)[None, :], other=0.0).to(tl.float32)
        scores = _biased(scores, bias)
    return tl.where((token < tokens)[None, :], scores, float("-inf"))


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
