"""What the attention ops share: their arguments, and on a CPU the scores of queries and keys, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..dispatch import block_bytes, check_kind, implementation, sum_dtype, watched

__all__ = ["arguments", "score_blocks"]

# One block of scores on the CPU path: with the block of probabilities beside it, what two cores' L2 holds.
BLOCK_BYTES = 1 << 20
# Numbers in the widest register: a softmax of 80 columns takes three fifths of the time of one of 77, whose end is done apart,
# and the product three quarters.
LANES = 16
# A bias below this is a mask: the lowest number of fp32 or bf16 is a usual way to write one, and no score and no
# logarithm of a sum can be told from it once it is added.
MASKED = -1e30
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
    if 0 in sums.stride() and any(
        stride == 0 and size > 1 for stride, size in zip(sums.stride(), sums.shape, strict=True)
    ):
        raise ValueError(f"{name} is written in place and must not be expanded, got strides {tuple(sums.stride())}")
    check_device(name, sums, query)
    batch = query.shape[0]
    if group.dim() != 1 or group.shape[0] != batch:
        raise ValueError(f"group must have shape ({batch},), one entry a batch row, got {tuple(group.shape)}")
    if group.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"group must be int32 or int64, got {group.dtype}")
    check_device("group", group, query)
    check_head_weight(head_weight, query)


def check_head_weight(head_weight: Tensor | None, query: Tensor) -> None:
    if head_weight is None:
        return
    if tuple(head_weight.shape) != (query.shape[1],):
        raise ValueError(f"head_weight must have shape ({query.shape[1]},), got {tuple(head_weight.shape)}")
    if not head_weight.is_floating_point():
        raise TypeError(f"head_weight must be floating point, got {head_weight.dtype}")
    check_device("head_weight", head_weight, query)


def check_tokens(tokens: Tensor | None, query: Tensor) -> None:
    if tokens is None:
        return
    if tokens.dim() != 1:
        raise ValueError(f"tokens must have one dimension, got shape {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}")
    check_device("tokens", tokens, query)


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


def scale_of(query: Tensor, scale: float | None) -> float:
    """Without one 1 / sqrt(d)."""
    check_kind("query", "Tensor", query)
    check_kind("scale", "Optional[float]", scale)
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def arguments(query: Tensor, scale: float | None, group: Tensor | None) -> tuple[float, Tensor]:
    """The defaults: of the scale, and batch row b in group b."""
    scale = scale_of(query, scale)
    return scale, _each_its_own(query) if group is None else group


_numbers: dict[tuple[int, torch.device], Tensor] = {}  # a launch less


def _each_its_own(query: Tensor) -> Tensor:
    of = query.shape[0], query.device
    if not query.is_cuda or watched():
        return torch.arange(of[0], device=of[1])
    found = _numbers.get(of)
    if found is None:
        found = torch.arange(of[0], device=of[1])
        # What a capture makes is there only when its graph runs.
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(of[1]).synchronize()  # other streams may read it next
            _numbers[of] = found
    return found


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
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, columns: int | None = None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """The scores of one batch row, block by block, in memory that the next block uses again.

    query [heads, n, d], key [key heads, t, d], mask a bias [heads, n, t] or None. Yields (heads, rows, scores
    [heads of the block, rows of the block, columns]), columns t or more: -inf beyond t. A block is BLOCK_BYTES or, if that is
    more, one row of one head. `columns` is for a softmax in place, which needs no second block: this one is twice as large.
    """
    (heads, n, _), tokens, dtype = query.shape, key.shape[1], sum_dtype(query)
    most = block_bytes(query, BLOCK_BYTES if columns is None else 2 * BLOCK_BYTES)
    columns = tokens if columns is None else columns
    room = max(1, most // (dtype.itemsize * max(columns, 1)))  # rows of one head in a block
    # Below 64 rows a product runs at half speed: fewer heads instead.
    row_step = min(n, room, max(64, room // heads))
    row_step = -(-n // -(-n // row_step)) if n else 0  # of equal size
    head_step = min(heads, max(1, room // row_step)) if n else heads
    shared = heads // key.shape[0]
    buffer = query.new_empty(head_step * row_step * columns, dtype=dtype)
    for first_head in range(0, heads, head_step):
        block = slice(first_head, min(first_head + head_step, heads))
        k = key[block] if shared == 1 else key[[h // shared for h in range(block.start, block.stop)]]
        k = k.to(dtype)
        if columns > tokens:
            k = torch.nn.functional.pad(k, (0, 0, 0, columns - tokens))
        for first_row in range(0, n, row_step):
            rows = slice(first_row, min(first_row + row_step, n))
            shape = (block.stop - block.start, rows.stop - rows.start, columns)
            scores = buffer[: math.prod(shape)].view(shape)
            torch.baddbmm(scores, query[block, rows].to(dtype), k.mT, beta=0, alpha=scale, out=scores)
            if columns > tokens:
                scores[..., tokens:].fill_(-torch.inf)
            if mask is not None:
                bias = mask[block, rows].to(dtype)
                scores[..., :tokens].add_(bias).masked_fill_(
                    bias < MASKED, -torch.inf
                )  # whatever the key holds, NaN too
            yield block, rows, scores


def softmax_of(scores: Tensor, out: Tensor) -> Tensor:
    """Probabilities in `out`; zeros in rows of -inf."""
    torch.softmax(scores, -1, out=out)
    if math.isnan(out[..., 0].sum()):
        out.masked_fill_((scores == -torch.inf).all(-1, keepdim=True), 0)
    return out


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
        sums[int(group)].add_(more)
        return
    counted = (group >= 0) & (group < len(sums))
    at = torch.where(counted, group, 0).long().view(1)
    sums.index_add_(0, at, torch.where(counted, more, 0).to(sums.dtype)[None])
