"""threshold_encode on a GPU: a product that counts, and the compaction of what is active.

A chunk's product leaves the number of active latents of every (row, tile of latents), and in a scratch that stays in
the L2 cache the pre-activations of those tiles that have any: at 32 active of 20,480 latents, fewer than one tile in
five is written or read again. A second kernel turns a row's numbers into the place where each tile's entries begin; a
third moves the entries there. A row's places run from row_starts[r] to row_starts[r + 1], so that the padded and the
CSR form are one program. Half-precision inputs are not centred: b_pre goes into the bias (product.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...dispatch import jit_over_rows, next_power_of_2, row_chunks, tl
from ..product import PRODUCT_TILE, TRITON_SCRATCH_BYTES, default_product, encoder_bias, tile_product

__all__ = ["threshold_encode_csr_triton", "threshold_encode_triton"]


@jit_over_rows
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
    total = tile_product(
        x_ptr + row[:, None] * stride_x_row,
        W_ptr + latent[:, None] * stride_W_latent,
        row < rows,
        latent < n_latents,
        d,
        stride_x_d,
        stride_W_d,
        BLOCK_ROWS,
        BLOCK_LATENTS,
        BLOCK_D,
    )
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
    blocks = default_product(x.dtype)
    n_tiles = -(-n_latents // blocks["BLOCK_LATENTS"])
    padded = n_tiles * blocks["BLOCK_LATENTS"]  # rows begin at multiples of 512 bytes
    chunks = row_chunks(rows, 4 * (padded + 2 * n_tiles + d + 2), TRITON_SCRATCH_BYTES, blocks["BLOCK_ROWS"])
    chunk = chunks[0].stop
    scratch = x.new_empty(chunk, padded, dtype=torch.float32)
    tile_counts, tile_places = (x.new_empty(chunk, n_tiles, dtype=torch.int32) for _ in range(2))
    counts, broken = (x.new_empty(chunk, dtype=torch.int32) for _ in range(2))
    floor = threshold.to(torch.float32).expand(n_latents)
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre)
        for out in chunks:
            part = x[out] - b_pre if full else x[out]
            programs = -(-part.shape[0] // blocks["BLOCK_ROWS"]) * n_tiles
            _threshold_encode_product_kernel[(programs,)](
                part, W_enc, bias, floor, scratch, tile_counts, part.shape[0], n_latents, d, *part.stride(),
                *W_enc.stride(), *bias.stride(), *floor.stride(), padded, n_tiles, **blocks,
            )  # fmt: skip
            _threshold_encode_place_kernel[(part.shape[0],)](
                tile_counts, tile_places, counts, broken, n_tiles,
                BLOCK_TILES=min(next_power_of_2(max(n_tiles, 2)), 1024), num_warps=4,
            )  # fmt: skip
            done = slice(0, part.shape[0])
            yield _Tiles(out, scratch[done], tile_counts, tile_places, counts[done], broken[done])


def _compact_triton(tiles: _Tiles, row_starts: Tensor, values: Tensor, indices: Tensor, n_latents: int) -> None:
    """Move the entries of `tiles` to `values` and `indices`, whose row r is row_starts[r] .. row_starts[r + 1] - 1."""
    n_tiles, block_tiles = tiles.tile_counts.shape[1], 8  # 1,024 entries a program
    with torch.cuda.device_of(values):
        _threshold_encode_compact_kernel[(tiles.counts.shape[0], -(-n_tiles // block_tiles))](
            tiles.scratch, tiles.tile_counts, tiles.tile_places, tiles.broken, row_starts, values, indices,
            n_latents, tiles.scratch.stride(0), n_tiles,
            BLOCK_TILES=block_tiles, BLOCK_LATENTS=PRODUCT_TILE["BLOCK_LATENTS"], num_warps=4,
        )  # fmt: skip


def threshold_encode_triton(
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
        _compact_triton(tiles, row_starts, values[-1], indices[-1], W_enc.shape[0])
        row_offsets[1:][tiles.rows] = tiles.counts.long()
    return torch.cat(values), torch.cat(indices), row_offsets.cumsum_(0)
