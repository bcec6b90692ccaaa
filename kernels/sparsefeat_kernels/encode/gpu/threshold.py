"""threshold_encode on a GPU: a product that counts, and the compaction of what is active.

A chunk's product (tiles.py) leaves the number of active latents of every (row, tile of latents), and in a scratch the
pre-activations of those tiles that have any: at 32 active of 20,480 latents, fewer than one tile in five is written or read
again. A second kernel turns a row's numbers into the place where each tile's entries begin; a third, one warp a row, goes
through the tiles that have any and moves their entries there. A row's places run from row_starts[r] to row_starts[r + 1], so
that the padded and the CSR form are one program.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import jit_over_rows, next_power_of_2, row_chunks, tl
from ..product import encoder_bias
from .tiles import SCRATCH_BYTES, default_tile, operands, precision, tile_sums

__all__ = ["threshold_encode_csr_triton", "threshold_encode_triton"]


@jit_over_rows
def _threshold_encode_product_kernel(
    x,
    W,
    b_pre_ptr,
    bias_ptr,
    threshold_ptr,
    scratch_ptr,
    tile_counts_ptr,
    rows,
    n_latents,
    d,
    n_tiles,
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
    """How many latents of one tile are active in each row, -1 for a row with NaN; in tiles that have any, the scratch
    [rows, n_tiles, BLOCK_LATENTS] is x W_enc^T + bias where active and 0 elsewhere."""
    # A program a tile: what a persistent one reads ahead would leave no shared memory for the rows' sums. Programs that
    # share latents are neighbours: a tile of W comes from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tile = tl.program_id(0)
    row = (tile % row_blocks) * BLOCK_ROWS
    block = tile // row_blocks
    total = tile_sums(
        x, W, b_pre_ptr, row, block * BLOCK_LATENTS, rows, n_latents, d,
        stride_x_row, stride_x_d, stride_W_latent, stride_W_d, stride_b_pre_d,
        DESCRIBED, CENTRED, PRECISION, BLOCK_ROWS, BLOCK_LATENTS, BLOCK_D,
    )  # fmt: skip
    latent = (block * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
    real = latent < n_latents
    # A latent that is not there has a bias that no sum makes positive.
    bias = tl.load(bias_ptr + latent, mask=real, other=-3.4028234663852886e38)
    threshold = tl.load(threshold_ptr + latent * stride_threshold_latent, mask=real, other=float("inf"))
    # NaN is above nothing, a negative threshold is 0.
    threshold = tl.where(threshold == threshold, tl.maximum(threshold, 0.0), float("inf"))
    a = total + bias[None, :]  # [BLOCK_ROWS, BLOCK_LATENTS]
    z = tl.where(a > threshold[None, :], a, 0.0)
    count = tl.sum((z != 0.0).to(tl.int32), axis=1)  # [BLOCK_ROWS]
    broken = tl.max(((a != a) & real[None, :]).to(tl.int32), axis=1)
    count = tl.where(broken > 0, -1, count)
    row += tl.arange(0, BLOCK_ROWS)
    place = row.to(tl.int64) * n_tiles + block
    tl.store(tile_counts_ptr + place, count, mask=row < rows)
    out = scratch_ptr + place[:, None] * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)[None, :]
    tl.store(out, z, mask=((row < rows) & (count > 0))[:, None])


@jit_over_rows
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


@jit_over_rows
def _threshold_encode_compact_kernel(
    scratch_ptr,
    tile_counts_ptr,
    tile_places_ptr,
    broken_ptr,
    row_starts_ptr,
    values_ptr,
    indices_ptr,
    n_tiles,
    BLOCK_TILES: tl.constexpr,
    MOVED: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
):
    """One row: the active entries move to their places, those past the row's last are dropped."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(row_starts_ptr + row)
    places = tl.load(row_starts_ptr + row + 1) - first
    values_ptr += first
    indices_ptr += first
    scratch_ptr += row * n_tiles * BLOCK_LATENTS
    tile_counts_ptr += row * n_tiles
    tile_places_ptr += row * n_tiles
    if tl.load(broken_ptr + row) > 0:
        for begin in range(0, places, BLOCK_LATENTS):
            of_nan = begin + tl.arange(0, BLOCK_LATENTS)
            nan = tl.full([BLOCK_LATENTS], float("nan"), tl.float32)
            tl.store(values_ptr + of_nan, nan, mask=of_nan < places)
            tl.store(indices_ptr + of_nan, of_nan.to(tl.int32), mask=of_nan < places)
    else:
        found = 0  # tiles with entries: their numbers take the place of counts that have been read
        for start in range(0, n_tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            some = (tl.load(tile_counts_ptr + tile, mask=tile < n_tiles, other=0) > 0).to(tl.int32)
            tl.debug_barrier()
            tl.store(tile_counts_ptr + found + tl.cumsum(some, axis=0) - 1, tile, mask=some > 0)
            found += tl.sum(some, axis=0)
        tl.debug_barrier()  # other lanes read what these wrote
        for start in range(0, found, MOVED):
            slot = start + tl.arange(0, MOVED)
            tile = tl.load(tile_counts_ptr + slot, mask=slot < found, other=0)  # [MOVED]
            before = tl.load(tile_places_ptr + tile, mask=slot < found, other=0)
            latent = tile[:, None] * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)[None, :]  # [MOVED, BLOCK_LATENTS]
            z = tl.load(scratch_ptr + latent, mask=(slot < found)[:, None], other=0.0)
            active = z != 0.0
            place = before[:, None] + tl.cumsum(active.to(tl.int32), axis=1) - 1
            kept = active & (place < places)
            tl.store(values_ptr + place, z, mask=kept)
            tl.store(indices_ptr + place, latent, mask=kept)


class _Tiles(NamedTuple):
    """What the product left of some rows."""

    rows: slice
    scratch: Tensor  # [rows, n_tiles, BLOCK_LATENTS] fp32, written only in tiles with active latents
    tile_counts: Tensor  # [rows, n_tiles] int32
    tile_places: Tensor  # [rows, n_tiles] int32
    counts: Tensor  # [rows] int32
    broken: Tensor  # [rows] int32


def _tiles_triton(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Tiles]:
    """The chunks of rows, one after the other: all write to the same memory."""
    rows, d = x.shape
    n_latents, tile = W_enc.shape[0], default_tile(x.dtype)
    width = tile["BLOCK_LATENTS"]
    n_tiles = -(-n_latents // width)
    chunks = row_chunks(rows, 4 * n_tiles * (width + 2) + 8, SCRATCH_BYTES, tile["BLOCK_ROWS"])
    chunk = chunks[0].stop
    scratch = x.new_empty(chunk, n_tiles, width, dtype=torch.float32)
    tile_counts, tile_places = (x.new_empty(chunk, n_tiles, dtype=torch.int32) for _ in range(2))
    counts, broken = (x.new_empty(chunk, dtype=torch.int32) for _ in range(2))
    floor = threshold.to(torch.float32).expand(n_latents)
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre)
        for out in chunks:
            part = x[out]
            x_tiles, W_tiles, described = operands(part, W_enc, tile)
            _threshold_encode_product_kernel[(-(-len(part) // tile["BLOCK_ROWS"]) * n_tiles,)](
                x_tiles, W_tiles, b_pre, bias, floor, scratch, tile_counts, len(part), n_latents, d, n_tiles,
                *part.stride(), *W_enc.stride(), b_pre.stride(0), floor.stride(0), DESCRIBED=described,
                CENTRED=x.dtype == torch.float32, PRECISION=precision(x.dtype), **tile,
            )  # fmt: skip
            _threshold_encode_place_kernel[(len(part),)](
                tile_counts, tile_places, counts, broken, n_tiles,
                BLOCK_TILES=min(next_power_of_2(max(n_tiles, 2)), 1024), num_warps=1,
            )  # fmt: skip
            done = slice(0, len(part))
            yield _Tiles(out, scratch[done], tile_counts, tile_places, counts[done], broken[done])


def _compact_triton(tiles: _Tiles, row_starts: Tensor, values: Tensor, indices: Tensor) -> None:
    """Move the entries of `tiles` to `values` and `indices`, whose row r is row_starts[r] .. row_starts[r + 1] - 1."""
    _, n_tiles, width = tiles.scratch.shape
    with torch.cuda.device_of(values):
        _threshold_encode_compact_kernel[(tiles.counts.shape[0],)](
            tiles.scratch, tiles.tile_counts, tiles.tile_places, tiles.broken, row_starts, values, indices, n_tiles,
            BLOCK_TILES=min(next_power_of_2(max(n_tiles, 2)), 256), MOVED=4, BLOCK_LATENTS=width, num_warps=1,
        )  # fmt: skip


def threshold_encode_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_zeros(x.shape[0], max_active, dtype=torch.float32)
    indices = x.new_zeros(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_empty(x.shape[0], dtype=torch.int32)
    for tiles in _tiles_triton(x, W_enc, b_enc, b_pre, threshold) if x.shape[0] else ():
        row_starts = torch.arange(tiles.counts.shape[0] + 1, device=x.device) * max_active
        _compact_triton(tiles, row_starts, values[tiles.rows], indices[tiles.rows])
        counts[tiles.rows] = tiles.counts
    return values, indices, counts


def threshold_encode_csr_triton(
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
        _compact_triton(tiles, row_starts, values[-1], indices[-1])
        row_offsets[1:][tiles.rows] = tiles.counts.long()
    return torch.cat(values), torch.cat(indices), row_offsets.cumsum_(0)
