"""threshold_encode on a CPU: products by chunks of rows, and the compaction of what is active."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import row_chunks, sum_dtype
from ..threads import conducted, each, shares, threads, together
from .product import preactivations
from .rounded import RoundedRows, pays_to_round, round_encoder
from .survivors import CANDIDATES, GROUPS, PAIRS, cuts, entries_that_reach, group_bounds, group_maxima

__all__ = ["threshold_encode_cpu", "threshold_encode_csr_cpu"]

# Bounds on what one call holds beside its inputs and outputs; with the 12 MiB of widened weights that preactivations
# may hold, together below 64 MiB.
PREACTIVATION_BYTES = 24 << 20  # pre-activations and centred inputs of one chunk of rows; below 32 MiB malloc keeps it
COMPACTED_ENTRIES = 1 << 17  # pre-activations compacted at a time: some 80 bytes each, if all of them are active
PIECE_ENTRIES = 9 << 20  # of a growing CSR code: above 32 MiB malloc asks the system for memory and returns it

# Rows go in chunks, whose pre-activations are one matrix product into a scratch that every chunk reuses. A chunk is
# compacted some rows at a time: a comparison and a `nonzero`, which lists rows and latents in index order already.
#
# On a processor with bf16 instructions the product is one of bf16 (rounded.py), of which a bound proves most
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
    encoder.bounds[2].masked_fill_(never, -torch.inf)  # a group of nothing else reaches 0 nowhere
    bounds = group_bounds(encoder.bounds, group)
    bias, zeros = b_enc.float(), torch.zeros(rows, dtype=torch.float32)
    most_groups = max(1, int(GROUPS_ALIVE * n_groups))
    chunks = row_chunks(rows, 2 * (n_latents + encoder.width) + 12 * d, PREACTIVATION_BYTES)
    product = torch.empty(chunks[0].stop if chunks else 0, n_latents, dtype=torch.bfloat16)
    block = max(1, CANDIDATES // threads() // (most_groups * group))
    for chunk in chunks:
        start, count = chunk.start, chunk.stop - chunk.start
        part, p = encoder.room_for(count), product[:count]
        together(encoder.rounding(x[chunk], b_pre, part))
        together(encoder.product(part, p))
        blocks = [
            slice(first, min(first + block, share.stop))
            for share in shares(count, threads())
            for first in range(share.start, share.stop, block)
        ]
        alive = torch.empty(count, n_groups, dtype=torch.bool)

        def look(some: slice, p: Tensor = p, part: RoundedRows = part, alive: Tensor = alive) -> None:
            top = group_maxima(p[some].view(-1, group, n_groups))  # [block, n_groups]
            alive[some] = top >= cuts(zeros[some], part.part(some), bounds)

        together(each(look, blocks))
        proved = part.provable & (alive.sum(1) <= most_groups)
        if 2 * int(proved.sum()) < count:  # such rows as are dense, or cannot be proved: no more of this
            for e in _entries_plainly(x[start:], W_enc, b_enc, b_pre, threshold):
                yield e._replace(rows=slice(start + e.rows.start, start + e.rows.stop))
            return
        alive &= proved[:, None]
        found: dict[int, tuple[Tensor, Tensor]] = {}  # by first row

        def search(
            some: slice,
            p: Tensor = p,
            part: RoundedRows = part,
            alive: Tensor = alive,
            found: dict[int, tuple[Tensor, Tensor]] = found,
        ) -> None:
            row, of_group = alive[some].nonzero(as_tuple=True)
            cut = cuts(zeros[some], part.part(some), bounds)
            row, latent = entries_that_reach(cut, p[some], row, of_group)
            found[some.start] = row + some.start, latent

        done = 0
        for first in range(0, len(blocks), threads()):
            several = blocks[first : first + threads()]
            together(each(search, several))
            if sum(len(row) for row, _ in found.values()) < PAIRS and several[-1].stop < count:
                continue
            stop = several[-1].stop
            row, latent = (torch.cat(parts) for parts in zip(*(found[at] for at in sorted(found)), strict=True))
            value = torch.empty(len(row), dtype=torch.float32)
            together(encoder.rescoring(part.centred, row, latent, value))
            value += bias[latent]
            active = value > floor[latent]
            row, latent, value = row[active], latent[active], value[active]
            broken = torch.zeros(stop - done, dtype=torch.bool)
            left = (~proved[done:stop]).nonzero()[:, 0] + done
            if len(left):
                entries = [(row, latent, value)]
                for e in _entries_plainly(x[chunk][left], W_enc, b_enc, b_pre, threshold):
                    entries.append((left[e.rows][e.row], e.latent, e.value))
                    broken[left[e.rows] - done] = e.broken
                row, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
            row, order = (row * n_latents + latent).sort()
            row = row // n_latents - done
            counts = torch.bincount(row, minlength=stop - done)
            yield _Entries(slice(start + done, start + stop), row, latent[order], value[order], counts, broken)
            found, done = {}, stop


def _entries_plainly(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Entries]:
    rows, d = x.shape
    n_latents, dtype = W_enc.shape[0], sum_dtype(x)
    floor = threshold.to(dtype).clamp_min(0)  # NaN stays: nothing is above it
    chunks = row_chunks(rows, (n_latents + d) * dtype.itemsize, PREACTIVATION_BYTES)
    scratch = x.new_empty(chunks[0].stop if chunks else 0, n_latents, dtype=dtype)
    for chunk in chunks:
        preactivations(x[chunk], W_enc, b_enc, b_pre, scratch[: chunk.stop - chunk.start])
        steps = row_chunks(chunk.stop - chunk.start, n_latents, COMPACTED_ENTRIES)
        done: dict[int, _Entries] = {}  # by first row

        def compact(some: slice, start: int = chunk.start, done: dict[int, _Entries] = done) -> None:
            a = scratch[some]  # [step, n_latents]
            active = a > floor
            broken = a.amax(dim=1).isnan()
            if bool(broken.any()):
                active[broken] = False
                active[broken, 0] = True
                a[broken, 0] = torch.nan
            row, latent = active.nonzero().unbind(1)
            out = slice(start + some.start, start + some.stop)
            done[some.start] = _Entries(out, row, latent, a[row, latent], active.sum(1), broken)

        for first in range(0, len(steps), threads()):
            several = steps[first : first + threads()]
            together(each(compact, several))
            yield from (done.pop(some.start) for some in several)


@conducted
def threshold_encode_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_zeros(x.shape[0], max_active, dtype=sum_dtype(x))
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


@conducted
def threshold_encode_csr_cpu(
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
                pieces.append((x.new_empty(size, dtype=sum_dtype(x)), x.new_empty(size, dtype=torch.int32)))
            last = min(len(value), first + size - place)
            for piece, part in zip(pieces[-1], (value, latent), strict=True):
                piece[place : place + last - first] = part[first:last]
            end, first = end + last - first, last
    values, indices = x.new_empty(end, dtype=sum_dtype(x)), x.new_empty(end, dtype=torch.int32)
    while pieces:
        start = (len(pieces) - 1) * size
        for joined, piece in zip((values, indices), pieces.pop(), strict=True):
            joined[start : start + size] = piece[: end - start]
    return values, indices, row_offsets.cumsum_(0)
