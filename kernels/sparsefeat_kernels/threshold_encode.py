"""threshold_encode and threshold_encode_csr: every pre-activation above a threshold, without the [rows, n_latents] tensor.

What JumpReLU, ReLU and BatchTopK with a stored threshold compute. Nothing is selected, so after the product there is
only the compaction of what is active, in index order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .csr import weight_gradient
from .dispatch import backend, implementation, jit, next_power_of_2, tl, without_autocast
from .prefilter import (
    CANDIDATES,
    GROUPS,
    PAIRS,
    bounds_by_group,
    entries_that_reach,
    group_margins,
    pays_to_round,
)
from .rounded_encoder import round_encoder
from .topk_encode import _check as check_encoder
from .topk_encode import _preactivations, _topk_encode_bias_kernel

__all__ = ["threshold_encode", "threshold_encode_csr"]

# Bounds on what one call holds beside its inputs and outputs; with the 12 MiB of widened weights that _preactivations
# may hold, together below 64 MiB.
PREACTIVATION_BYTES = 24 << 20  # pre-activations and centred inputs of one chunk of rows; below 32 MiB malloc keeps it
COMPACTED_ENTRIES = 1 << 17  # pre-activations compacted at a time: some 80 bytes each, if all of them are active
PIECE_ENTRIES = 9 << 20  # of a growing CSR code: above 32 MiB malloc asks the system for memory and returns it
PADDED_ENTRIES = 1 << 20  # entries of a CSR code that its gradient pads at a time, some 40 bytes each


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above a threshold, padded to `max_active` a row, and how many there were.

        a[r, i] = (x[r] - b_pre) . W_enc[i] + b_enc[i]
        latent i is active in row r where a[r, i] > max(threshold[i], 0); its value is a[r, i]

    A threshold of 0 is a plain ReLU; a negative one is the same, since values are positive always.

    Args:
        x: [rows, d], float32, float64, bfloat16 or float16; rows may be 0, strides are free.
        W_enc: [n_latents, d]; b_enc: [n_latents]; b_pre: [d]; dtype and device of x.
        threshold: a scalar tensor or [n_latents], any floating dtype; compared in the dtype of the sum. A latent whose
            threshold is NaN or infinite is never active.
        max_active: entries a row is given, 1 <= max_active <= n_latents.

    Returns:
        values [rows, max_active], float64 for float64 inputs and float32 for all others; indices [rows, max_active]
        int32; counts [rows] int32, the true number of active latents. Entries are in order of their index; the rest of
        a row is value 0 at index 0. A row overflows where counts > max_active: it then holds its max_active lowest
        active indices, whatever the values, and counts is still exact. A row in which any a is NaN has max_active NaN
        values, the indices 0 .. max_active - 1 and count 1. An a of +inf is active.

    Precision: sums as in topk_encode, IEEE fp32 (fp64 for float64 inputs). A latent whose a is nearer to the threshold
    than the rounding of its sum may fall on either side. The same bits on every run of the same build, path and shape.

    Gradients reach x, W_enc, b_enc and b_pre through the entries whose value is not 0, without float atomics; not the
    threshold. The host never waits for the device (float64 on a GPU, which takes the CPU path, does).

    Cost: 2 rows n_latents d FLOPs; reads W_enc once a chunk of rows. Scratch stays below 64 MiB whatever rows is (as
    long as one row does, 80 n_latents bytes). On a CPU with bf16 instructions a bf16 product proves most latents
    inactive and only the others are computed in fp32: 0.4 of the fp32 product's time for 100 active of 20,480, as much
    as without where more than some 4 % are active.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices or max_active.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0), max_active=3)
        (tensor([[2., 3., 0.]]), tensor([[0, 2, 0]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return torch.ops.sparsefeat.threshold_encode(x, W_enc, b_enc, b_pre, threshold, max_active)


def threshold_encode_csr(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold, as a code of rows of different lengths. The host waits for the device.

    The same entries in the same order as threshold_encode's, without a limit: row r owns the entries
    row_offsets[r] .. row_offsets[r + 1] - 1. A row in which any a is NaN has one entry, NaN at index 0.

    Args: as threshold_encode's, without max_active.

    Returns: values [entries]; indices [entries] int32; row_offsets [rows + 1] int64. `entries` depends on the data: the
    host reads it once a chunk of rows.

    Gradients, precision, cost and errors are threshold_encode's; on a CPU at most 72 MiB of the code are held twice, on a
    GPU all of it while its chunks are joined.
    The gradient pads some rows at a time (the host waits once for the lengths) and, with half-precision inputs that
    take several such blocks, sums in a float32 copy of the block's inputs and of the weight gradient.

    Example:
        >>> x = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode_csr(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0))
        (tensor([2., 3., 2.]), tensor([0, 2, 1], dtype=torch.int32), tensor([0, 2, 3]))
    """
    return torch.ops.sparsefeat.threshold_encode_csr(x, W_enc, b_enc, b_pre, threshold)


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of threshold_encode: dense, any dtype."""
    a = (x - b_pre) @ W_enc.T + b_enc
    active = (a > threshold.to(a.dtype)) & (a > 0)
    order = (~active).sort(dim=1, stable=True).indices[:, :max_active]  # active ones first, each kind by index
    values = torch.where(active, a, 0).gather(1, order)
    indices = torch.where(values != 0, order, 0)
    broken = a.isnan().any(dim=1)
    values = torch.where(broken[:, None], torch.nan, values)
    indices = torch.where(broken[:, None], torch.arange(max_active, device=x.device), indices)
    return values, indices.to(torch.int32), torch.where(broken, 1, active.sum(1)).to(torch.int32)


def _check(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int | None = None
) -> None:
    if W_enc.dim() == 2 and W_enc.shape[0] == 0:
        raise ValueError(f"W_enc must have at least one latent, got shape {tuple(W_enc.shape)}")
    check_encoder(x, W_enc, b_enc, b_pre, 1, "raw")
    n_latents = W_enc.shape[0]
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != n_latents):
        raise ValueError(
            f"threshold must be a scalar tensor or have shape ({n_latents},), got {tuple(threshold.shape)}"
        )
    if not threshold.is_floating_point():
        raise TypeError(f"threshold must be floating point, got {threshold.dtype}; convert it with .float()")
    if threshold.device != x.device:
        raise ValueError(f"threshold must be on x's device {x.device}, got {threshold.device}; move one of them")
    if max_active is not None and not 1 <= max_active <= n_latents:
        raise ValueError(f"max_active must be between 1 and n_latents = {n_latents}, got {max_active}")


def _value_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------------- CPU
# Rows go in chunks, whose pre-activations are one matrix product into a scratch that every chunk reuses. A chunk is
# compacted some rows at a time: a comparison and a `nonzero`, which lists rows and latents in index order already.
#
# On a processor with bf16 instructions the product is one of bf16 (rounded_encoder.py), of which a bound proves most
# latents inactive; the others are computed in fp32 and compared. Its bias is b_enc less the threshold: what is stored is
# the distance from the threshold, so that the rounding of the stored value is least where it matters. Rows with many
# such latents, or without a proof, go the plain way.

GROUPS_ALIVE = 0.6  # a row with more of its groups to look at is computed plainly: 4 % of 20,480 latents active


class _Entries(NamedTuple):
    """The active entries of some rows, row by row, latents ascending."""

    rows: slice
    row: Tensor  # [entries] int64, counted from rows.start
    latent: Tensor  # [entries] int64
    value: Tensor  # [entries]
    counts: Tensor  # [rows] int64
    broken: Tensor  # [rows] bool: a row with NaN, which has one entry


def _entries_cpu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Entries]:
    group = next((g for g in GROUPS if len(W_enc) % g == 0), None)
    if group is not None and W_enc.is_contiguous() and pays_to_round(x, W_enc):
        return _entries_of_rounded(x, W_enc, b_enc, b_pre, threshold, group)
    return _entries_plainly(x, W_enc, b_enc, b_pre, threshold)


def _entries_of_rounded(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, group: int
) -> Iterator[_Entries]:
    (rows, d), n_latents = x.shape, len(W_enc)
    n_groups = n_latents // group
    floor = threshold.float().clamp_min(0).expand(n_latents)
    never = ~floor.isfinite()
    encoder = round_encoder(W_enc, b_enc.double() - floor.double().masked_fill(never, 0), rows)
    encoder.bounds[2].masked_fill_(never, -torch.inf)  # no upper bound of theirs reaches 0
    group_bounds, entry_bounds = bounds_by_group(encoder, group)
    bias, zeros = b_enc.float(), torch.zeros(rows)
    most_groups = max(1, int(GROUPS_ALIVE * n_groups))
    chunk = max(1, min(rows, PREACTIVATION_BYTES // (2 * (n_latents + encoder.low.shape[1]) + 12 * d)))
    chunk = -(-rows // -(-rows // chunk))
    product = torch.empty(chunk, n_latents, dtype=torch.bfloat16)
    block = max(1, CANDIDATES // (most_groups * group))
    for start in range(0, rows, chunk):
        part = encoder.rows(x[start : start + chunk], b_pre)
        count = len(part.centred)
        p = encoder.product(part, product[:count])
        blocks = [slice(first, min(first + block, count)) for first in range(0, count, block)]
        alive = torch.empty(count, n_groups, dtype=torch.bool)
        for some in blocks:
            top = p[some].view(-1, group, n_groups).amax(1).float()  # [block, n_groups]
            alive[some] = top + group_margins(top, part.size[some], part.lost[some], group_bounds) >= 0
        proved = part.provable & (alive.sum(1) <= most_groups)
        if 2 * int(proved.sum()) < count:  # such rows as are dense, or cannot be proved: no more of this
            for e in _entries_plainly(x[start:], W_enc, b_enc, b_pre, threshold):
                yield e._replace(rows=slice(start + e.rows.start, start + e.rows.stop))
            return
        alive &= proved[:, None]
        found: list[tuple[Tensor, Tensor]] = []
        done = 0
        for some in blocks:
            row, latent = entries_that_reach(
                zeros, p[some], alive[some], part.size[some], part.lost[some], entry_bounds, signed=False
            )
            found.append((row + some.start, latent))
            if sum(len(row) for row, _ in found) < PAIRS and some.stop < count:
                continue
            row, latent = (torch.cat(parts) for parts in zip(*found, strict=True))
            value = encoder.exact(part.centred, row, latent) + bias[latent]
            active = value > floor[latent]
            row, latent, value = row[active], latent[active], value[active]
            broken = torch.zeros(some.stop - done, dtype=torch.bool)
            left = (~proved[done : some.stop]).nonzero()[:, 0] + done
            if len(left):
                entries = [(row, latent, value)]
                for e in _entries_plainly(x[start : start + count][left], W_enc, b_enc, b_pre, threshold):
                    entries.append((left[e.rows][e.row], e.latent, e.value))
                    broken[left[e.rows] - done] = e.broken
                row, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
            row, order = (row * n_latents + latent).sort()
            row = row // n_latents - done
            counts = torch.bincount(row, minlength=some.stop - done)
            yield _Entries(slice(start + done, start + some.stop), row, latent[order], value[order], counts, broken)
            found, done = [], some.stop


def _entries_plainly(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Entries]:
    rows, d = x.shape
    n_latents, dtype = W_enc.shape[0], _value_dtype(x)
    floor = threshold.to(dtype).clamp_min(0)  # NaN stays: nothing is above it
    chunk = max(1, min(rows, PREACTIVATION_BYTES // ((n_latents + d) * dtype.itemsize)))
    chunk = -(-rows // -(-rows // chunk)) if rows else 1  # as many chunks, of equal size
    scratch = x.new_empty(chunk, n_latents, dtype=dtype)
    step = max(1, COMPACTED_ENTRIES // n_latents)
    for start in range(0, rows, chunk):
        part = x[start : start + chunk]
        _preactivations(part, W_enc, b_enc, b_pre, scratch[: part.shape[0]])
        for first in range(0, part.shape[0], step):
            a = scratch[first : min(first + step, part.shape[0])]  # [step, n_latents]
            active = a > floor
            broken = a.amax(dim=1).isnan()
            if bool(broken.any()):
                active[broken] = False
                active[broken, 0] = True
                a[broken, 0] = torch.nan
            row, latent = active.nonzero().unbind(1)
            out = slice(start + first, start + first + a.shape[0])
            yield _Entries(out, row, latent, a[row, latent], active.sum(1), broken)


def _threshold_encode_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_zeros(x.shape[0], max_active, dtype=_value_dtype(x))
    indices = x.new_zeros(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_empty(x.shape[0], dtype=torch.int32)
    for rows, row, latent, value, count, broken in _entries_cpu(x, W_enc, b_enc, b_pre, threshold):
        slot = torch.arange(row.shape[0], device=x.device) - (count.cumsum(0) - count)[row]
        if bool((count > max_active).any()):
            kept = slot < max_active
            row, latent, value, slot = row[kept], latent[kept], value[kept], slot[kept]
        values[rows][row, slot] = value
        indices[rows][row, slot] = latent.to(torch.int32)
        counts[rows] = count
        if bool(broken.any()):
            values[rows][broken] = torch.nan
            indices[rows][broken] = torch.arange(max_active, device=x.device, dtype=torch.int32)
    return values, indices, counts


def _threshold_encode_csr_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # A list of chunks' entries, joined, would be the code twice and what malloc keeps in between. Pieces of this size go
    # back to the system one by one, and what is not yet written of one takes no memory.
    size = max(1, min(PIECE_ENTRIES, x.shape[0] * W_enc.shape[0]))
    pieces: list[tuple[Tensor, Tensor]] = []
    row_offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
    end = 0
    for rows, _, latent, value, count, _ in _entries_cpu(x, W_enc, b_enc, b_pre, threshold):
        row_offsets[1:][rows] = count
        first = 0
        while first < len(value):
            place = end % size
            if place == 0:
                pieces.append((x.new_empty(size, dtype=_value_dtype(x)), x.new_empty(size, dtype=torch.int32)))
            last = min(len(value), first + size - place)
            for piece, part in zip(pieces[-1], (value, latent), strict=True):
                piece[place : place + last - first] = part[first:last]
            end, first = end + last - first, last
    values, indices = x.new_empty(end, dtype=_value_dtype(x)), x.new_empty(end, dtype=torch.int32)
    while pieces:
        start = (len(pieces) - 1) * size
        for joined, piece in zip((values, indices), pieces.pop(), strict=True):
            joined[start : start + size] = piece[: end - start]
    return values, indices, row_offsets.cumsum_(0)


# ------------------------------------------------------------------------------------------------------------ Triton
# A chunk's product leaves the number of active latents of every (row, tile of latents), and in a scratch that stays in
# the L2 cache the pre-activations of those tiles that have any: at 32 active of 20,480 latents, fewer than one tile in
# five is written or read again. A second kernel turns a row's numbers into the place where each tile's entries begin; a
# third moves the entries there. A row's places run from row_starts[r] to row_starts[r + 1], so that the padded and the
# CSR form are one program. Half-precision inputs are not centred: b_pre goes into the bias (see topk_encode.py).

TRITON_SCRATCH_BYTES = 48 << 20  # pre-activations, numbers, places and centred inputs of a chunk
PRODUCT_TILE = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64}
FULL_PRODUCT_TILE = {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 128, "BLOCK_D": 16}  # fp32: multiply-adds of registers


@jit
def _threshold_encode_product_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    threshold_ptr,
    scratch_ptr,
    tile_counts_ptr,
    rows,
    n_latents,
    d,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_bias_latent,
    stride_threshold_latent,
    stride_scratch_row,
    n_tiles,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """How many latents of one tile are active in each row, -1 for a row with NaN; in tiles that have any, the scratch
    is x W_enc^T + bias where active and 0 elsewhere."""
    # Programs that share latents are neighbours: a tile of W_enc comes from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = ((tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    tile = tl.program_id(0) // row_blocks
    latent = (tile * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + row[:, None] * stride_x_row + column[None, :] * stride_x_d
    W_ptrs = W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d
    total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    for start in range(0, d, BLOCK_D):
        left = d - start
        x = tl.load(x_ptrs, mask=(row < rows)[:, None] & (column < left)[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_D]
        w = tl.load(W_ptrs, mask=(latent < n_latents)[:, None] & (column < left)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_LATENTS]
        x_ptrs += BLOCK_D * stride_x_d
        W_ptrs += BLOCK_D * stride_W_d
    real = latent < n_latents
    bias = tl.load(bias_ptr + latent * stride_bias_latent, mask=real, other=0.0).to(tl.float32)
    threshold = tl.load(threshold_ptr + latent * stride_threshold_latent, mask=real, other=float("inf"))
    a = total + bias[None, :]
    z = tl.where((a > threshold[None, :]) & (a > 0.0), a, 0.0)
    count = tl.sum((z != 0.0).to(tl.int32), axis=1)  # [BLOCK_ROWS]
    broken = tl.max(((a != a) & real[None, :]).to(tl.int32), axis=1)
    count = tl.where(broken > 0, -1, count)
    tl.store(tile_counts_ptr + row * n_tiles + tile, count, mask=row < rows)
    stored = ((row < rows) & (count > 0))[:, None] & real[None, :]
    tl.store(scratch_ptr + row[:, None] * stride_scratch_row + latent[None, :], z, mask=stored)


@jit
def _threshold_encode_place_kernel(
    tile_counts_ptr, tile_places_ptr, counts_ptr, broken_ptr, n_tiles, BLOCK_TILES: tl.constexpr
):
    """One row: where among its entries each tile's begin, how many there are, and whether it has NaN."""
    row = tl.program_id(0).to(tl.int64)
    place, broken = 0, 0
    for start in range(0, n_tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        count = tl.load(tile_counts_ptr + row * n_tiles + tile, mask=tile < n_tiles, other=0)  # [BLOCK_TILES]
        broken = tl.maximum(broken, tl.max((count < 0).to(tl.int32), axis=0))
        count = tl.maximum(count, 0)
        before = place + tl.cumsum(count, axis=0) - count
        tl.store(tile_places_ptr + row * n_tiles + tile, before, mask=tile < n_tiles)
        place += tl.sum(count, axis=0)
    tl.store(counts_ptr + row, tl.where(broken > 0, 1, place))
    tl.store(broken_ptr + row, broken)


@jit
def _threshold_encode_compact_kernel(
    scratch_ptr,
    tile_counts_ptr,
    tile_places_ptr,
    broken_ptr,
    row_starts_ptr,
    values_ptr,
    indices_ptr,
    n_latents,
    stride_scratch_row,
    n_tiles,
    BLOCK_TILES: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
):
    """One row and some of its tiles: the active entries move to their places, those past the row's last are dropped."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(row_starts_ptr + row)
    places = tl.load(row_starts_ptr + row + 1) - first
    if tl.load(broken_ptr + row) > 0:
        if tl.program_id(1) == 0:
            for start in range(0, places, BLOCK_LATENTS):
                place = start + tl.arange(0, BLOCK_LATENTS)
                nan = tl.full([BLOCK_LATENTS], float("nan"), tl.float32)
                tl.store(values_ptr + first + place, nan, mask=place < places)
                tl.store(indices_ptr + first + place, place.to(tl.int32), mask=place < places)
    else:
        tile = tl.program_id(1) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
        count = tl.load(tile_counts_ptr + row * n_tiles + tile, mask=tile < n_tiles, other=0)
        before = tl.load(tile_places_ptr + row * n_tiles + tile, mask=tile < n_tiles, other=0)
        latent = tile[:, None] * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)[None, :]  # [BLOCK_TILES, BLOCK_LATENTS]
        read = (count > 0)[:, None] & (latent < n_latents)
        z = tl.load(scratch_ptr + row * stride_scratch_row + latent, mask=read, other=0.0)
        active = z != 0.0
        place = before[:, None] + tl.cumsum(active.to(tl.int32), axis=1) - 1
        kept = active & (place < places)
        tl.store(values_ptr + first + place, z, mask=kept)
        tl.store(indices_ptr + first + place, latent.to(tl.int32), mask=kept)


class _Tiles(NamedTuple):
    """What the product left of some rows."""

    rows: slice
    scratch: Tensor  # [rows, n_latents] fp32, written only in tiles with active latents
    tile_counts: Tensor  # [rows, n_tiles] int32
    tile_places: Tensor  # [rows, n_tiles] int32
    counts: Tensor  # [rows] int32
    broken: Tensor  # [rows] int32


def _tiles_triton(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Tiles]:
    """The chunks of rows, one after the other: all write to the same memory."""
    rows, d = x.shape
    n_latents, full = W_enc.shape[0], x.dtype == torch.float32
    tile = FULL_PRODUCT_TILE if full else PRODUCT_TILE
    stages = 2 if full or backend() == "hip" else 3
    n_tiles = -(-n_latents // tile["BLOCK_LATENTS"])
    padded = n_tiles * tile["BLOCK_LATENTS"]  # rows begin at multiples of 512 bytes
    chunk = max(1, min(rows, TRITON_SCRATCH_BYTES // (4 * (padded + 2 * n_tiles + d + 2))))
    if chunk > tile["BLOCK_ROWS"]:
        chunk -= chunk % tile["BLOCK_ROWS"]
    scratch = x.new_empty(chunk, padded, dtype=torch.float32)
    tile_counts, tile_places = (x.new_empty(chunk, n_tiles, dtype=torch.int32) for _ in range(2))
    counts, broken = (x.new_empty(chunk, dtype=torch.int32) for _ in range(2))
    floor = threshold.to(torch.float32).expand(n_latents)
    bias = b_enc
    with torch.cuda.device_of(x):
        if not full:
            bias = x.new_empty(n_latents, dtype=torch.float32)
            _topk_encode_bias_kernel[(-(-n_latents // 16),)](
                W_enc, b_enc, b_pre, bias, n_latents, d, *W_enc.stride(), *b_enc.stride(), *b_pre.stride(),
                BLOCK_LATENTS=16, BLOCK_D=128, num_warps=4,
            )  # fmt: skip
        for start in range(0, rows, chunk):
            part = x[start : start + chunk]
            part = part - b_pre if full else part
            blocks = -(-part.shape[0] // tile["BLOCK_ROWS"]) * n_tiles
            _threshold_encode_product_kernel[(blocks,)](
                part, W_enc, bias, floor, scratch, tile_counts, part.shape[0], n_latents, d, *part.stride(),
                *W_enc.stride(), *bias.stride(), *floor.stride(), padded, n_tiles, **tile, num_warps=8,
                num_stages=stages,
            )  # fmt: skip
            _threshold_encode_place_kernel[(part.shape[0],)](
                tile_counts, tile_places, counts, broken, n_tiles,
                BLOCK_TILES=min(next_power_of_2(max(n_tiles, 2)), 1024), num_warps=4,
            )  # fmt: skip
            done = slice(0, part.shape[0])
            yield _Tiles(
                slice(start, start + part.shape[0]), scratch[done], tile_counts, tile_places, counts[done], broken[done]
            )


def _compact_triton(tiles: _Tiles, row_starts: Tensor, values: Tensor, indices: Tensor, n_latents: int) -> None:
    """Move the entries of `tiles` to `values` and `indices`, whose row r is row_starts[r] .. row_starts[r + 1] - 1."""
    n_tiles, block_tiles = tiles.tile_counts.shape[1], 8  # 1,024 entries a program
    with torch.cuda.device_of(values):
        _threshold_encode_compact_kernel[(tiles.counts.shape[0], -(-n_tiles // block_tiles))](
            tiles.scratch, tiles.tile_counts, tiles.tile_places, tiles.broken, row_starts, values, indices,
            n_latents, tiles.scratch.stride(0), n_tiles,
            BLOCK_TILES=block_tiles, BLOCK_LATENTS=PRODUCT_TILE["BLOCK_LATENTS"], num_warps=4,
        )  # fmt: skip


def _threshold_encode_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_zeros(x.shape[0], max_active, dtype=torch.float32)
    indices = x.new_zeros(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_empty(x.shape[0], dtype=torch.int32)
    for tiles in _tiles_triton(x, W_enc, b_enc, b_pre, threshold) if x.shape[0] else ():
        row_starts = torch.arange(tiles.counts.shape[0] + 1, device=x.device) * max_active
        _compact_triton(tiles, row_starts, values[tiles.rows], indices[tiles.rows], W_enc.shape[0])
        counts[tiles.rows] = tiles.counts
    return values, indices, counts


def _threshold_encode_csr_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    values = [x.new_empty(0, dtype=torch.float32)]
    indices = [x.new_empty(0, dtype=torch.int32)]
    row_offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
    for tiles in _tiles_triton(x, W_enc, b_enc, b_pre, threshold) if x.shape[0] else ():
        row_starts = x.new_zeros(tiles.counts.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(tiles.counts, 0, out=row_starts[1:])
        entries = int(row_starts[-1])  # the host waits for the device
        values.append(x.new_empty(entries, dtype=torch.float32))
        indices.append(x.new_empty(entries, dtype=torch.int32))
        _compact_triton(tiles, row_starts, values[-1], indices[-1], W_enc.shape[0])
        row_offsets[1:][tiles.rows] = tiles.counts.long()
    return torch.cat(values), torch.cat(indices), row_offsets.cumsum_(0)


# ---------------------------------------------------------------------------------------------- gradient of a CSR code
# Both gradients pad blocks of rows and hand them to the ops for padded codes. A block's width is that of its own fullest
# row, so that one crowded row widens one block only. Blocks are summed in order.


def _blocks_of_rows(row_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, width) of blocks of at most PADDED_ENTRIES places, or of one row."""
    blocks, first, width = [], 0, 0
    lengths = row_offsets.diff().tolist()
    for row, length in enumerate(lengths):
        if row > first and (row + 1 - first) * max(width, length) > PADDED_ENTRIES:
            blocks.append((first, row, width))
            first, width = row, 0
        width = max(width, length)
    return [*blocks, (first, len(lengths), width)] if lengths else []


def _padded(values: Tensor, indices: Tensor, row_offsets: Tensor, block: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The rows of a block as a padded code."""
    first, last, width = block
    position = row_offsets[first:last, None] + torch.arange(width, device=values.device)  # [last - first, width]
    inside = position < row_offsets[first + 1 : last + 1, None]
    position = torch.where(inside, position, 0)
    return torch.where(inside, values[position], 0), indices[position]


def _csr_grad_x(grad_values: Tensor, indices: Tensor, row_offsets: Tensor, W_enc: Tensor) -> Tensor:
    grad_x = W_enc.new_zeros(row_offsets.shape[0] - 1, W_enc.shape[1])
    for block in _blocks_of_rows(row_offsets):
        padded = _padded(grad_values, indices, row_offsets, block)
        grad_x[block[0] : block[1]] = torch.ops.sparsefeat.sparse_decode(
            *padded, W_enc, W_enc.new_zeros(W_enc.shape[1])
        )
    return grad_x


def _csr_grad_weights(
    grad_values: Tensor, indices: Tensor, row_offsets: Tensor, x: Tensor, b_pre: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    blocks, dtype = _blocks_of_rows(row_offsets), _value_dtype(x)
    if len(blocks) == 1:
        return weight_gradient(*_padded(grad_values, indices, row_offsets, blocks[0]), x, b_pre, n_latents)
    weight = x.new_zeros(n_latents, x.shape[1], dtype=dtype)
    bias = x.new_zeros(n_latents, dtype=dtype)
    for block in blocks:
        padded = _padded(grad_values, indices, row_offsets, block)
        more_weight, more_bias = weight_gradient(*padded, x[block[0] : block[1]].to(dtype), b_pre.to(dtype), n_latents)
        weight += more_weight
        bias += more_bias
    return weight.to(x.dtype), bias


# ------------------------------------------------------------------------------------------------------- registration


def _threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, max_active)
    run = _threshold_encode_triton if implementation(x) == "triton" else _threshold_encode_cpu
    return run(x, W_enc, b_enc, b_pre, threshold, max_active)


def _threshold_encode_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, max_active)
    shape = (x.shape[0], max_active)
    return (
        x.new_empty(shape, dtype=_value_dtype(x)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(x.shape[0], dtype=torch.int32),
    )


def _threshold_encode_csr(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold)
    run = _threshold_encode_csr_triton if implementation(x) == "triton" else _threshold_encode_csr_cpu
    return run(x, W_enc, b_enc, b_pre, threshold)


def _threshold_encode_csr_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold)
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(entries, dtype=_value_dtype(x)),
        x.new_empty(entries, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


def _weight_gradients(ctx: Any, weight: Tensor, bias: Tensor, W_enc: Tensor) -> list[Tensor | None]:
    """The gradients of W_enc, b_enc and b_pre from z^T (x - b_pre) and the column sums of z, the gradient of the code:
    that of b_pre is -(column sums of z) W_enc."""
    _, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    sums = bias.to(W_enc.dtype)
    with torch.autocast(W_enc.device.type, enabled=False):
        return [weight if need_W else None, sums if need_b_enc else None, -(sums @ W_enc) if need_b_pre else None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre, _, _ = inputs
    values, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, W_enc, b_pre, values, indices)


def _backward(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, values, indices = ctx.saved_tensors
    g = torch.where(values != 0, grad_values, 0)
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sparsefeat.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = weight_gradient(g, indices, x, b_pre, W_enc.shape[0])
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None, None


def _setup_context_csr(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre, _ = inputs
    _, indices, row_offsets = output
    ctx.mark_non_differentiable(indices, row_offsets)
    ctx.save_for_backward(x, W_enc, b_pre, indices, row_offsets)


def _backward_csr(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, indices, row_offsets = ctx.saved_tensors
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.sparsefeat.threshold_encode_csr_grad_x(grad_values, indices, row_offsets, W_enc)
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = torch.ops.sparsefeat.threshold_encode_csr_grad_weights(
            grad_values, indices, row_offsets, x, b_pre, W_enc.shape[0]
        )
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None


_threshold_encode_op = torch.library.custom_op(
    "sparsefeat::threshold_encode",
    without_autocast(_threshold_encode),
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold, SymInt max_active) "
    "-> (Tensor, Tensor, Tensor)",
)
_threshold_encode_op.register_fake(_threshold_encode_fake)
_threshold_encode_op.register_autograd(_backward, setup_context=_setup_context)

_threshold_encode_csr_op = torch.library.custom_op(
    "sparsefeat::threshold_encode_csr",
    without_autocast(_threshold_encode_csr),
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold) -> (Tensor, Tensor, Tensor)",
)
_threshold_encode_csr_op.register_fake(_threshold_encode_csr_fake)
_threshold_encode_csr_op.register_autograd(_backward_csr, setup_context=_setup_context_csr)

_csr_grad_x_op = torch.library.custom_op(
    "sparsefeat::threshold_encode_csr_grad_x",
    without_autocast(_csr_grad_x),
    mutates_args=(),
    schema="(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor W_enc) -> Tensor",
)
_csr_grad_x_op.register_fake(
    lambda grad_values, indices, row_offsets, W_enc: W_enc.new_empty(row_offsets.shape[0] - 1, W_enc.shape[1])
)

_csr_grad_weights_op = torch.library.custom_op(
    "sparsefeat::threshold_encode_csr_grad_weights",
    without_autocast(_csr_grad_weights),
    mutates_args=(),
    schema="(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor x, Tensor b_pre, SymInt n_latents) "
    "-> (Tensor, Tensor)",
)
_csr_grad_weights_op.register_fake(
    lambda grad_values, indices, row_offsets, x, b_pre, n_latents: (
        x.new_empty(n_latents, x.shape[1]),
        x.new_empty(n_latents, dtype=_value_dtype(x)),
    )
)
