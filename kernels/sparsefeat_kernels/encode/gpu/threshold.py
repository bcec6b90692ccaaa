"""threshold_encode on a GPU: a product that marks what is active, and the compaction of what is marked.

The product (tiles.py) leaves a word of 32 bits for every (row, 32 latents), a bit set where the pre-activation is above its
threshold or NaN, and the 32 pre-activations of those words that have any, in slots: at 32 active of 20,480 latents fewer than
one word in twenty has one. Every program has as many slots and fills them in order; of every (row, tile) the first one is noted,
the others follow. A tile that its program has no slots left for is computed again in a launch of its own, which adds up the bits
before it and so finds the places of its values. Then one warp takes a row: the numbers of bits, summed up, say where each word's
entries begin, and all words give their lowest bits away together until none is left. A row's places run from row_starts[r] to
row_starts[r + 1], so that the padded and the CSR form are one program; with no places at all it counts.

Latents are taken in chunks where the words of many rows would not fit, so that W is read once for every few thousand rows; counts
go from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import jit, jit_over_rows, next_power_of_2, tl
from ...tuning_table import tuned
from ..product import encoder_bias
from .tiles import Operands, chunks_of, default_tile, room, scratch_bytes, stage_bytes, tile_sums

__all__ = ["marked_chunks", "threshold_encode_csr_triton", "threshold_encode_triton"]

WORD = 32  # latents
LEAST_ROWS = 4096  # at once, where there are as many: what a chunk of latents leaves room for
# Slots for one word in so many of max_active, which is to be above the row with the most, not above the mean; of the CSR form,
# which is told nothing, for as many words as a published SAE has active latents. What they do not suffice for is made again.
PART_OF_MOST, WORDS_OF_CSR = 8, 64
WIDTH_AGAIN = 64


@jit
def _halves(a, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(a, [ROWS, 2, COLUMNS // 2]), (0, 2, 1)))


@jit
def _store_words(a, slot, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of [ROWS, COLUMNS] to their slots [ROWS, COLUMNS / 32]; none where that is negative. In pieces of 64 columns, which
    pass through shared memory one after the other."""
    if COLUMNS > 64:
        first, second = _halves(a, ROWS, COLUMNS)
        slot_first, slot_second = _halves(slot, ROWS, COLUMNS // 32)
        _store_words(first, slot_first, out, ROWS, COLUMNS // 2)
        _store_words(second, slot_second, out, ROWS, COLUMNS // 2)
    else:
        places = out + (slot * 32)[:, :, None] + tl.arange(0, 32)[None, None, :]
        tl.store(places, tl.reshape(a, [ROWS, COLUMNS // 32, 32]), mask=(slot >= 0)[:, :, None])


@jit
def _store_bits(a, words, place, out, start, places, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Those of [ROWS, COLUMNS] whose bit is set, a word's from `place` [ROWS, COLUMNS / 32] of its row on, which begins at `start`
    and has `places`, [ROWS, 1]. A word at a time: with more, registers would not do. Returns how many of a row are NaN."""
    if COLUMNS > 32:
        first, second = _halves(a, ROWS, COLUMNS)
        words_first, words_second = _halves(words, ROWS, COLUMNS // 32)
        place_first, place_second = _halves(place, ROWS, COLUMNS // 32)
        nan = _store_bits(first, words_first, place_first, out, start, places, ROWS, COLUMNS // 2)
        return nan + _store_bits(second, words_second, place_second, out, start, places, ROWS, COLUMNS // 2)
    else:
        bit = 1 << tl.arange(0, 32)[None, :]
        at = place + _ones(words & (bit - 1))  # [ROWS, 32]
        marked = (words & bit) != 0
        tl.store(out + start + at, a, mask=marked & (at < places))
        return tl.sum((marked & (a != a)).to(tl.int32), axis=1)


@jit_over_rows
def _threshold_encode_product_kernel(
    x,
    W,
    b_pre_ptr,
    bias_ptr,
    threshold_ptr,
    scratch_ptr,
    words_ptr,
    starts_ptr,
    slots,
    rows,
    n_latents,
    d,
    n_words,
    first_row,
    first_latent,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_b_pre_d,
    stride_threshold_latent,
    DESCRIBED: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """words [rows, n_words] of x W^T + bias, of rows and latents from the first ones on, and in scratch [programs, slots, 32] those
    that are not 0; starts [rows, blocks]: the slot of the first of them, below 0 where the program had none left."""
    WORDS: tl.constexpr = BLOCK_LATENTS // 32
    # Here: added to every latent they would be operations of each.
    bias_ptr += first_latent
    threshold_ptr += tl.cast(first_latent, tl.int64) * stride_threshold_latent
    slot_of_next = tl.program_id(0) * slots
    end = slot_of_next + slots
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_blocks * tl.cdiv(n_latents, BLOCK_LATENTS)
    # Programs that share latents run together: a tile of W comes from memory once.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row = (tile % row_blocks) * BLOCK_ROWS
        block = tile // row_blocks
        total = tile_sums(
            x, W, b_pre_ptr, first_row + row, first_latent + block * BLOCK_LATENTS, first_row + rows,
            first_latent + n_latents, d,
            stride_x_row, stride_x_d, stride_W_latent, stride_W_d, stride_b_pre_d,
            DESCRIBED, CENTRED, PRECISION, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D,
        )  # fmt: skip
        column = tl.arange(0, BLOCK_LATENTS)
        latent = (block * BLOCK_LATENTS + column).to(tl.int64)
        real = latent < n_latents
        # A latent that is not there has a bias that no sum makes positive, and a threshold that nothing is above.
        bias = tl.load(bias_ptr + latent, mask=real, other=-3.4028234663852886e38)
        threshold = tl.load(threshold_ptr + latent * stride_threshold_latent, mask=real, other=float("inf"))
        # NaN is above nothing, a negative threshold is 0.
        threshold = tl.where(threshold == threshold, tl.maximum(threshold, 0.0), float("inf"))
        a = total + bias[None, :]  # [BLOCK_ROWS, BLOCK_LATENTS]
        bit = tl.where(a <= threshold[None, :], 0, 1 << (column % 32)[None, :])
        words = tl.sum(tl.reshape(bit, [BLOCK_ROWS, WORDS, 32]), axis=2)
        out_row = row + tl.arange(0, BLOCK_ROWS)
        inside = out_row < rows
        # The scratch is too small for offsets of 2^31.
        out = out_row[:, None] * n_words + block * WORDS + tl.arange(0, WORDS)[None, :]
        tl.store(words_ptr + out, words, mask=inside[:, None])
        marked = ((words != 0) & inside[:, None]).to(tl.int32)  # [BLOCK_ROWS, WORDS]
        of_row = tl.sum(marked, axis=1)
        wanted = tl.sum(of_row, axis=0)
        fits = slot_of_next + wanted <= end
        # Below 0 with what is added for the words after it.
        start = tl.where(fits, slot_of_next + tl.cumsum(of_row, axis=0) - of_row, -64)
        tl.store(starts_ptr + out_row * (n_words // WORDS) + block, start, mask=inside)
        slot = tl.where(marked > 0, start[:, None] + tl.cumsum(marked, axis=1) - marked, -1)
        _store_words(a, slot, scratch_ptr, BLOCK_ROWS, BLOCK_LATENTS)
        slot_of_next += tl.where(fits, wanted, 0)


@jit
def _ones(x):
    """How many bits of int32 are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@jit
def _of_latents(bits, word, n_latents):
    """The bits of latents that are there: Inf times the zeros of others is NaN, which is above every threshold."""
    there = tl.maximum(n_latents - word * 32, 0)
    return tl.where(there < 32, bits & ((1 << tl.minimum(there, 31)) - 1), bits)


@jit_over_rows
def _threshold_encode_again_kernel(
    x,
    W,
    b_pre_ptr,
    bias_ptr,
    words_ptr,
    starts_ptr,
    row_starts_ptr,
    counts_ptr,
    values_ptr,
    places,
    rows,
    n_latents,
    d,
    n_words,
    first_row,
    first_output,
    first_latent,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_b_pre_d,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
    DESCRIBED: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tiles [BLOCK_ROWS, TILE] without slots, of which a program takes BLOCK_LATENTS latents: their values, where the compaction
    will put their indices. Where a row has NaN in one, its start becomes -2, which tells the compaction."""
    WORDS: tl.constexpr = BLOCK_LATENTS // 32
    starts_of_row = n_words * 32 // TILE
    bias_ptr += first_latent
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_blocks * tl.cdiv(n_latents, BLOCK_LATENTS)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (tile % row_blocks) * BLOCK_ROWS
        block = tile // row_blocks
        of_tile = starts_ptr + block * BLOCK_LATENTS // TILE
        if tl.load(of_tile + row * starts_of_row) < 0:
            out_row = row + tl.arange(0, BLOCK_ROWS)
            inside = out_row < rows
            output = first_output + out_row
            found = tl.zeros([BLOCK_ROWS], tl.int32)
            if not FIRST:  # -1 of a row with NaN, whose values are written again
                found = tl.maximum(tl.load(counts_ptr + output, mask=inside, other=0), 0)
            word = out_row[:, None] * n_words + tl.arange(0, WORDS)[None, :]
            for before in range(0, block * WORDS, WORDS):
                found += tl.sum(_ones(tl.load(words_ptr + before + word, mask=inside[:, None], other=0)), axis=1)
            words = tl.load(words_ptr + block * WORDS + word, mask=inside[:, None], other=0)  # [BLOCK_ROWS, WORDS]
            words = _of_latents(words, block * WORDS + tl.arange(0, WORDS)[None, :], n_latents)
            count = _ones(words)
            place = found[:, None] + tl.cumsum(count, axis=1) - count
            total = tile_sums(
                x, W, b_pre_ptr, first_row + row, first_latent + block * BLOCK_LATENTS, first_row + rows,
                first_latent + n_latents, d,
                stride_x_row, stride_x_d, stride_W_latent, stride_W_d, stride_b_pre_d,
                DESCRIBED, CENTRED, PRECISION, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D,
            )  # fmt: skip
            latent = (block * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
            a = total + tl.load(bias_ptr + latent, mask=latent < n_latents, other=0.0)[None, :]
            # From the chunk's first on: it has no 2^31 pre-activations.
            start, most = out_row * places, tl.zeros([BLOCK_ROWS], tl.int32) + places
            out = values_ptr + tl.cast(first_output, tl.int64) * places
            if row_starts_ptr is not None:
                start = tl.load(row_starts_ptr + output, mask=inside, other=0).to(tl.int32)
                most = tl.load(row_starts_ptr + output + 1, mask=inside, other=0).to(tl.int32) - start
                out = values_ptr
            nan = _store_bits(a, words, place, out, start[:, None], most[:, None], BLOCK_ROWS, BLOCK_LATENTS)
            broken = tl.zeros([BLOCK_ROWS], tl.int32) - 2
            tl.store(of_tile + out_row * starts_of_row, broken, mask=inside & (nan > 0))


@jit_over_rows
def _threshold_encode_compact_kernel(
    scratch_ptr,
    words_ptr,
    starts_ptr,
    row_starts_ptr,
    counts_ptr,
    values_ptr,
    indices_ptr,
    places,
    n_words,
    n_latents,
    first_row,
    first_latent,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One row, counted from the first of its chunk: the marked entries move to their places behind those of the chunks before,
    those past the row's last are dropped; after the last chunk zeros fill the row. Until then a row with NaN has count -1.
    Without row_starts all rows have `places`."""
    row = tl.program_id(0).to(tl.int64)
    words_ptr += row * n_words
    starts_ptr += row * (n_words // WORDS)
    row += first_row
    start = row * places
    if row_starts_ptr is not None:
        start = tl.load(row_starts_ptr + row)
        places = (tl.load(row_starts_ptr + row + 1) - start).to(tl.int32)
    values_ptr += start
    indices_ptr += start
    found, broken = 0, False
    if not FIRST:
        found = tl.load(counts_ptr + row)
        broken = found < 0
        found = tl.maximum(found, 0)
    nan = tl.zeros([BLOCK_WORDS], tl.int32)
    for first in range(0, n_words, BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        bits = tl.load(words_ptr + word, mask=word < n_words, other=0)  # [BLOCK_WORDS]
        marked = tl.reshape((bits != 0).to(tl.int32), [BLOCK_WORDS // WORDS, WORDS])
        bits = _of_latents(bits, word, n_latents)
        count = _ones(bits)
        place = found + tl.cumsum(count, axis=0) - count
        found += tl.sum(count, axis=0)
        start_of_tile = tl.load(starts_ptr + word // WORDS, mask=word < n_words, other=0)
        stored = start_of_tile >= 0
        nan |= (start_of_tile == -2).to(tl.int32)
        slot = start_of_tile + tl.reshape(tl.cumsum(marked, axis=1) - marked, [BLOCK_WORDS])
        for _ in range(0, tl.max(count, axis=0)):
            lowest = bits & -bits
            # Its place is the exponent.
            at = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
            a = tl.load(scratch_ptr + slot * 32 + at, mask=(bits != 0) & stored, other=0.0)
            kept = (bits != 0) & (place < places)
            tl.store(values_ptr + place, a, mask=kept & stored)
            tl.store(indices_ptr + place, first_latent + word * 32 + at, mask=kept)
            nan |= (a != a).to(tl.int32)
            place += 1
            bits ^= lowest
    broken |= tl.max(nan, axis=0) > 0
    if LAST:
        first_of_rest = tl.where(broken, 0, found)
        rest = tl.where(broken, float("nan"), 0.0)
        tl.debug_barrier()  # of a row with NaN these are the last to write
        for begin in range(first_of_rest, places, BLOCK_WORDS):
            place = begin + tl.arange(0, BLOCK_WORDS)
            tl.store(values_ptr + place, tl.zeros([BLOCK_WORDS], tl.float32) + rest, mask=place < places)
            tl.store(indices_ptr + place, tl.where(broken, place, 0), mask=place < places)
        tl.store(counts_ptr + row, tl.where(broken, 1, found))
    else:
        tl.store(counts_ptr + row, tl.where(broken, -1, found))


class Marked(NamedTuple):
    """What the product left of some rows and latents."""

    again: Operands | None  # None: every tile has slots
    vectors: tuple[Tensor, Tensor]  # b_pre and the bias
    rows: slice
    latents: slice
    last: bool  # no latents follow
    n_words: int
    scratch: Tensor  # fp32 [slots, 32]
    words: Tensor  # int32 [rows, n_words]
    starts: Tensor  # int32 [rows, n_words / words of a tile]
    tile: int  # latents

    def compact(
        self, counts: Tensor, values: Tensor, indices: Tensor, row_starts: Tensor | None = None, places: int = 0,
        first_row: int = 0,
    ) -> None:  # fmt: skip
        """Move entries to `values` and `indices`, whose row r has the places row_starts[r] .. row_starts[r + 1] - 1, or of
        whose rows each has `places`; first_row: the one of these that is the chunk's first."""
        if self.again is not None:
            self.make_again(self.again, counts, values, row_starts, places, first_row)
        with torch.cuda.device_of(values):
            _threshold_encode_compact_kernel[(self.rows.stop - self.rows.start,)](
                self.scratch, self.words, self.starts, row_starts, counts, values, indices, places, self.n_words,
                self.latents.stop - self.latents.start, first_row, self.latents.start, FIRST=self.latents.start == 0, LAST=self.last, WORDS=self.tile // WORD,
                BLOCK_WORDS=min(next_power_of_2(max(self.n_words, 2)), 128), num_warps=1,
            )  # fmt: skip

    def make_again(
        self, of: Operands, counts: Tensor, values: Tensor, row_starts: Tensor | None, places: int, first_row: int
    ) -> None:
        b_pre, bias = self.vectors
        rows, n = self.rows.stop - self.rows.start, self.latents.stop - self.latents.start
        with torch.cuda.device_of(values):
            _threshold_encode_again_kernel[(of.programs(rows, n),)](
                of.x, of.W, b_pre, bias, self.words, self.starts, row_starts, counts, values, places, rows, n, of.d,
                self.n_words, self.rows.start, first_row, self.latents.start, *of.strides, b_pre.stride(0),
                FIRST=self.latents.start == 0, TILE=self.tile, **of.constants,
            )  # fmt: skip


def _tile(x: Tensor, W_enc: Tensor) -> Mapping[str, int]:
    """That of topk_encode, with as many stages as leave room for what passes through shared memory, fp32 [rows, 64]."""
    entry = tuned("topk_encode", W_enc, x.shape[0])
    tile = default_tile(x, W_enc) if entry is None else entry.blocks
    stages = (room(tile) - tile["BLOCK_ROWS"] * 64 * 4) // stage_bytes(tile, x.itemsize)
    return {**tile, "num_stages": max(2, min(tile["num_stages"], stages))}


def operands_again(x: Tensor, W_enc: Tensor, tile: Mapping[str, int]) -> Operands:
    """Of tiles of 64 latents: beside a larger one's sums the places of its entries do not fit the registers."""
    return Operands.of(x, W_enc, {**tile, "BLOCK_LATENTS": min(tile["BLOCK_LATENTS"], WIDTH_AGAIN)})


def marked_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None, least_rows: int,
    words_a_row: int, tile: Mapping[str, int] | None = None,
) -> Iterator[Marked]:  # fmt: skip
    """The chunks, one after the other: all write to the same memory. words_a_row: for so many marked words of a row there are
    slots at least."""
    tile = _tile(x, W_enc) if tile is None else tile
    n_latents, height, width = W_enc.shape[0], tile["BLOCK_ROWS"], tile["BLOCK_LATENTS"]
    chunks = chunks_of(x, W_enc, tile, 4 / WORD + 4 / width, 4 * WORD * words_a_row, 1 << 31, least_rows)
    most = chunks[0][1][0].stop, -(-chunks[0][0].stop // width)  # rows, blocks of latents
    words = x.new_empty(most[0] * most[1] * (width // WORD), dtype=torch.int32)
    starts = x.new_empty(most[0] * most[1], dtype=torch.int32)
    of = Operands.of(x, W_enc, tile)
    # What is left of the memory, or as much as there can be.
    programs = of.programs(most[0], chunks[0][0].stop)
    each = -(-(-(-most[0] // height) * most[1]) // programs) * height * (width // WORD)
    slots = min(each, (scratch_bytes() - 4 * (len(words) + len(starts))) // (4 * WORD * programs))
    slots = max(1, slots - slots % 16 if slots >= 16 else slots)  # one kernel for all these numbers
    scratch = x.new_empty(programs * slots * WORD, dtype=torch.float32)
    again = operands_again(x, W_enc, tile) if slots < each else None
    threshold = threshold.to(torch.float32)
    strides = *of.strides, b_pre.stride(0), threshold.stride(0) if threshold.dim() else 0
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre) if bias is None else bias
    for latents, of_rows in chunks:
        n = latents.stop - latents.start
        n_words = -(-n // width) * width // WORD
        for rows in of_rows:
            n_rows = rows.stop - rows.start
            with torch.cuda.device_of(x):
                _threshold_encode_product_kernel[(min(programs, of.programs(n_rows, n)),)](
                    of.x, of.W, b_pre, bias, threshold, scratch, words, starts, slots, n_rows, n, of.d, n_words, rows.start,
                    latents.start, *strides, **of.constants,
                )  # fmt: skip
            vectors, found = (b_pre, bias), (scratch, words, starts)
            yield Marked(again, vectors, rows, latents, latents.stop == n_latents, n_words, *found, width)


def threshold_encode_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int,
    bias: Tensor | None = None, tile: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """bias: what `encoder_bias` made of these weights before; tile: the product's sizes, warps and stages."""
    rows = x.shape[0]
    values = x.new_empty(rows, max_active, dtype=torch.float32)
    indices = x.new_empty(rows, max_active, dtype=torch.int32)
    counts = x.new_empty(rows, dtype=torch.int32)
    weights = W_enc, b_enc, b_pre, threshold, bias
    words = max(1, max_active // PART_OF_MOST)
    for marked in marked_chunks(x, *weights, LEAST_ROWS, words, tile) if rows else ():
        marked.compact(counts, values, indices, places=max_active, first_row=marked.rows.start)
    return values, indices, counts


def threshold_encode_csr_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All latents of a chunk's rows at once: entries are in order of the rows."""
    values = [x.new_empty(0, dtype=torch.float32)]
    indices = [x.new_empty(0, dtype=torch.int32)]
    row_offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
    weights = W_enc, b_enc, b_pre, threshold, bias
    for marked in marked_chunks(x, *weights, 1, WORDS_OF_CSR) if x.shape[0] else ():
        counts = x.new_empty(marked.rows.stop - marked.rows.start, dtype=torch.int32)
        marked.compact(counts, values[0], indices[0])  # to no places: what it does is count
        row_starts = x.new_zeros(counts.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(counts, 0, out=row_starts[1:])
        entries = int(row_starts[-1])  # the host waits for the device
        values.append(x.new_empty(entries, dtype=torch.float32))
        indices.append(x.new_empty(entries, dtype=torch.int32))
        marked.compact(counts, values[-1], indices[-1], row_starts)
        row_offsets[1:][marked.rows] = counts.long()
    return torch.cat(values), torch.cat(indices), row_offsets.cumsum_(0)
