"""threshold_encode on a GPU, in two launches: a product that marks what is active, and the compaction of what is marked.

The product (tiles.py) leaves a word of 32 bits for every (row, 32 latents), a bit set where the pre-activation is above its
threshold or NaN, and in a scratch the pre-activations of those words that have any: at 32 active of 20,480 latents fewer than
one in twenty is written. Then one warp takes a row: the numbers of bits, summed up, say where each word's entries begin, and
all words give their lowest bits away together until none is left. A row's places run from row_starts[r] to row_starts[r + 1],
so that the padded and the CSR form are one program; with no places at all it counts.

The padded form takes latents in chunks, so that W is read once for every few thousand rows; counts go from chunk to chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import jit, jit_over_rows, next_power_of_2, tl
from ...tuning_table import tuned
from ..product import encoder_bias
from .tiles import Operands, chunks_of, default_tile, room, stage_bytes, tile_sums

__all__ = ["marked_chunks", "threshold_encode_csr_triton", "threshold_encode_triton"]

WORD = 32  # latents
LEAST_ROWS = 4096  # at once, where there are as many: what a chunk of latents leaves room for


@jit
def _store_marked(a, marked, out, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Those words of [ROWS, COLUMNS] that are marked [ROWS, COLUMNS / 32], to rows that are `stride` apart. In pieces of 64
    columns, which pass through shared memory one after the other."""
    if COLUMNS > 64:
        half = tl.permute(tl.reshape(a, [ROWS, 2, COLUMNS // 2]), (0, 2, 1))
        marked_half = tl.permute(tl.reshape(marked, [ROWS, 2, COLUMNS // 64]), (0, 2, 1))
        first, second = tl.split(half)
        marked_first, marked_second = tl.split(marked_half)
        _store_marked(first, marked_first, out, stride, ROWS, COLUMNS // 2)
        _store_marked(second, marked_second, out + COLUMNS // 2, stride, ROWS, COLUMNS // 2)
    else:
        column = (tl.arange(0, COLUMNS // 32) * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
        places = out + tl.arange(0, ROWS)[:, None, None] * stride + column
        tl.store(places, tl.reshape(a, [ROWS, COLUMNS // 32, 32]), mask=marked[:, :, None])


@jit_over_rows
def _threshold_encode_product_kernel(
    x,
    W,
    b_pre_ptr,
    bias_ptr,
    threshold_ptr,
    scratch_ptr,
    words_ptr,
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
    """words [rows, n_words] of x W^T + bias, and scratch [rows, n_words, 32] where a word is not 0, of rows and latents from
    the first ones on."""
    WORDS: tl.constexpr = BLOCK_LATENTS // 32
    # Here: added to every latent they would be operations of each.
    bias_ptr += first_latent
    threshold_ptr += tl.cast(first_latent, tl.int64) * stride_threshold_latent
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
        inside = (out_row < rows)[:, None]
        # The scratch is too small for offsets of 2^31.
        out = out_row[:, None] * n_words + block * WORDS + tl.arange(0, WORDS)[None, :]
        tl.store(words_ptr + out, words, mask=inside)
        scratch = scratch_ptr + row * (n_words * 32) + block * BLOCK_LATENTS
        _store_marked(a, (words != 0) & inside, scratch, n_words * 32, BLOCK_ROWS, BLOCK_LATENTS)


@jit
def _ones(x):
    """How many bits of int32 are set."""
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@jit_over_rows
def _threshold_encode_compact_kernel(
    scratch_ptr,
    words_ptr,
    row_starts_ptr,
    counts_ptr,
    values_ptr,
    indices_ptr,
    places,
    n_words,
    first_row,
    first_latent,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """One row, counted from the first of its chunk: the marked entries move to their places behind those of the chunks before,
    those past the row's last are dropped; after the last chunk zeros fill the row. Until then a row with NaN has count -1.
    Without row_starts all rows have `places`."""
    row = tl.program_id(0).to(tl.int64)
    words_ptr += row * n_words
    scratch_ptr += row * n_words * 32
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
        count = _ones(bits)
        place = found + tl.cumsum(count, axis=0) - count
        found += tl.sum(count, axis=0)
        for _ in range(0, tl.max(count, axis=0)):
            lowest = bits & -bits
            # Its place is the exponent.
            latent = word * 32 - 127 + ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF)
            a = tl.load(scratch_ptr + latent, mask=bits != 0, other=0.0)
            kept = (bits != 0) & (place < places)
            tl.store(values_ptr + place, a, mask=kept)
            tl.store(indices_ptr + place, first_latent + latent, mask=kept)
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

    rows: slice
    latents: slice
    last: bool  # no latents follow
    n_words: int
    scratch: Tensor  # fp32 [rows, n_words, 32], written only where a word is not 0
    words: Tensor  # int32 [rows, n_words]

    def compact(
        self, counts: Tensor, values: Tensor, indices: Tensor, row_starts: Tensor | None = None, places: int = 0,
        first_row: int = 0,
    ) -> None:  # fmt: skip
        """Move entries to `values` and `indices`, whose row r has the places row_starts[r] .. row_starts[r + 1] - 1, or of
        whose rows each has `places`; first_row: the one of these that is the chunk's first."""
        with torch.cuda.device_of(values):
            _threshold_encode_compact_kernel[(self.rows.stop - self.rows.start,)](
                self.scratch, self.words, row_starts, counts, values, indices, places, self.n_words, first_row,
                self.latents.start, FIRST=self.latents.start == 0, LAST=self.last,
                BLOCK_WORDS=min(next_power_of_2(max(self.n_words, 2)), 128), num_warps=1,
            )  # fmt: skip


def _tile(x: Tensor, W_enc: Tensor) -> Mapping[str, int]:
    """That of topk_encode, with as many stages as leave room for what passes through shared memory, fp32 [rows, 64]."""
    entry = tuned("topk_encode", W_enc, x.shape[0])
    tile = default_tile(x, W_enc) if entry is None else entry.blocks
    stages = (room(tile) - tile["BLOCK_ROWS"] * 64 * 4) // stage_bytes(tile, x.itemsize)
    return {**tile, "num_stages": max(2, min(tile["num_stages"], stages))}


def marked_chunks(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None, least_rows: int,
    tile: Mapping[str, int] | None = None,
) -> Iterator[Marked]:  # fmt: skip
    """The chunks, one after the other: all write to the same memory."""
    tile = _tile(x, W_enc) if tile is None else tile
    n_latents, width = W_enc.shape[0], tile["BLOCK_LATENTS"]
    chunks = chunks_of(x, W_enc, tile, 4 + 4 / WORD, 0, 1 << 31, least_rows)
    most = chunks[0][1][0].stop, -(-chunks[0][0].stop // width) * width
    scratch = x.new_empty(most[0] * most[1], dtype=torch.float32)
    words = x.new_empty(most[0] * most[1] // WORD, dtype=torch.int32)
    of = Operands.of(x, W_enc, tile)
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
                _threshold_encode_product_kernel[(of.programs(n_rows, n),)](
                    of.x, of.W, b_pre, bias, threshold, scratch, words, n_rows, n, of.d, n_words, rows.start,
                    latents.start, *strides, **of.constants,
                )  # fmt: skip
            yield Marked(rows, latents, latents.stop == n_latents, n_words, scratch, words)


def threshold_encode_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int,
    bias: Tensor | None = None, tile: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """bias: what `encoder_bias` made of these weights before; tile: the product's sizes, warps and stages."""
    rows = x.shape[0]
    values = x.new_empty(rows, max_active, dtype=torch.float32)
    indices = x.new_empty(rows, max_active, dtype=torch.int32)
    counts = x.new_empty(rows, dtype=torch.int32)
    for marked in marked_chunks(x, W_enc, b_enc, b_pre, threshold, bias, LEAST_ROWS, tile) if rows else ():
        marked.compact(counts, values, indices, places=max_active, first_row=marked.rows.start)
    return values, indices, counts


def threshold_encode_csr_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All latents of a chunk's rows at once: entries are in order of the rows."""
    values = [x.new_empty(0, dtype=torch.float32)]
    indices = [x.new_empty(0, dtype=torch.int32)]
    row_offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
    for marked in marked_chunks(x, W_enc, b_enc, b_pre, threshold, bias, 1) if x.shape[0] else ():
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
