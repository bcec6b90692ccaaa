"""The product of a GPU's encoders: persistent programs, whose tiles the copy engine reads where there is one.

On a GPU with a copy engine (sm_90 and later) a descriptor's tile is one instruction; elsewhere, and of tensors whose rows do
not begin at multiples of 16 bytes, tiles are loaded by pointers.
Half-precision inputs are not centred, since x - b_pre rounded to half precision would lose more than the product: b_pre
is in the bias (product.py). fp32 rows are, as they leave shared memory, and are multiplied on the matrix units, each factor
split into three bf16 parts and six of the nine products summed: what is left out is 2^-26 of a product and less, which the
bound of an IEEE sum (2^-24 of each) has room for. SPARSEFEAT_IEEE=1 asks for fused multiply-adds instead.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...dispatch import (
    INTERPRETED,
    backend,
    has_copy_engine,
    has_warp_groups,
    jit,
    row_chunks,
    shared_memory,
    tensor_descriptor,
    tl,
    triton_version,
)

__all__ = [
    "LARGE_TILE",
    "SCRATCH_BYTES",
    "Operands",
    "chunks_of",
    "default_tile",
    "multiprocessors",
    "precision",
    "room",
    "stage_bytes",
    "tile_sums",
]

SCRATCH_BYTES = 58 << 20  # what one call holds beside its inputs and outputs
# Fewer rows at once, and reading W would take a fifth of the time that multiplying takes (H100: 3 TB/s, 700 TFLOP/s).
LEAST_ROWS = 1024
IEEE = os.environ.get("SPARSEFEAT_IEEE", "0") not in ("", "0")
HEIGHTS = "BLOCK_ROWS", "BLOCK_LATENTS"  # of a tile of x and of one of W
SMALLEST_ROOM = 99 << 10  # of shared memory, which the smaller GPUs of each generation have
# With four stages 192 KiB of shared memory, which an H100 has: the cheapest loop a product there can have. An H200 measured it
# 1.37 to 1.45 times as fast as the small one at 4,096 rows, 1.07 times at 256 (bench/results/smoke-nvidia-h200.json).
LARGE_TILE = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}


def default_tile(x: Tensor, W: Tensor) -> Mapping[str, int]:
    """Block sizes, warps and stages without a tuning table: for half precision LARGE_TILE on sm_90 (on sm_100 it spills) where
    the copy engine fills it and small ones would be more than the multiprocessors; else within SMALLEST_ROOM (AMD: 64 KiB)."""
    if x.dtype == torch.float32:
        return {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
    # One takes as long as two small ones: of fewer, each could have a multiprocessor.
    many = 2 * tiles_of(x.shape[0], W.shape[0], LARGE_TILE) > multiprocessors(x.device)
    if many and not INTERPRETED and has_warp_groups() and readable(x) and readable(W):
        return LARGE_TILE
    few = backend() == "hip"
    return {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2 if few else 3}


def each(tile: Mapping[str, int]) -> int:
    """Programs of one multiprocessor."""
    return 1 if tile["BLOCK_LATENTS"] > 128 else 2


def room(tile: Mapping[str, int]) -> int:
    """Bytes of shared memory to plan a program with."""
    alone = each(tile) == 1 and not INTERPRETED and has_copy_engine()
    return shared_memory() if alone else SMALLEST_ROOM


def stage_bytes(tile: Mapping[str, int], itemsize: int) -> int:
    """Of a product's loads in flight."""
    return (tile["BLOCK_ROWS"] + tile["BLOCK_LATENTS"]) * tile["BLOCK_D"] * itemsize


def tiles_of(rows: int, n_latents: int, tile: Mapping[str, int]) -> int:
    return -(-rows // tile["BLOCK_ROWS"]) * -(-n_latents // tile["BLOCK_LATENTS"])


def precision(dtype: torch.dtype) -> str:
    """Of the product, for `tl.dot`. The interpreter has no parts, nor have versions before 3.6."""
    parts = dtype == torch.float32 and not (IEEE or INTERPRETED) and triton_version() >= (3, 6)
    return "bf16x6" if parts else "ieee"


def readable(tensor: Tensor) -> bool:
    """Whether a descriptor can read tiles of [n, d]: columns side by side, rows that begin at multiples of 16 bytes."""
    d, whole = tensor.shape[1], 16 // tensor.itemsize
    rows = tensor.stride(0) >= d and tensor.stride(0) % whole == 0
    return rows and tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0


class Operands(NamedTuple):
    """The arguments that all launches of a call's product share."""

    x: Any  # what tiles are read from: descriptors, or the tensors
    W: Any
    d: int
    strides: tuple[int, ...]  # of x and of W
    most: int  # programs that run at once
    tile: Mapping[str, int]
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, x: Tensor, W: Tensor, tile: Mapping[str, int]) -> Operands:
        described = (INTERPRETED or has_copy_engine()) and readable(x) and readable(W)
        of = x, W
        if described:
            of = tuple(
                tensor_descriptor(t, [tile[height], tile["BLOCK_D"]]) for t, height in zip(of, HEIGHTS, strict=True)
            )
        constants = {
            "DESCRIBED": described,
            "CENTRED": x.dtype == torch.float32,
            "PRECISION": precision(x.dtype),
            **tile,
        }
        most = multiprocessors(x.device) * each(tile)
        return cls(*of, x.shape[1], (*x.stride(), *W.stride()), most, tile, constants)

    def programs(self, rows: int, n_latents: int) -> int:
        """Persistent: as many as run at once, or one for every tile where these are fewer."""
        return min(tiles_of(rows, n_latents, self.tile), self.most)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def chunks_of(
    x: Tensor,
    W: Tensor,
    tile: Mapping[str, int],
    bytes_an_entry: float,
    bytes_a_row: int,
    most_latents: int,
    least_rows: int = LEAST_ROWS,
) -> list[tuple[slice, list[slice]]]:
    """Chunks of at most `most_latents` latents, and of the rows of each, whose scratch is within SCRATCH_BYTES: as many
    latents as leave room for `least_rows` rows."""
    blocks, sizes = (tile["BLOCK_ROWS"], tile["BLOCK_LATENTS"]), (x.shape[0], W.shape[0])
    room = SCRATCH_BYTES, bytes_an_entry, bytes_a_row
    return _chunked(sizes, blocks, room, most_latents, least_rows, multiprocessors(x.device))


@functools.lru_cache(maxsize=1024)
def _chunked(
    sizes: tuple[int, int],
    blocks: tuple[int, int],
    room: tuple[int, float, int],
    most_latents: int,
    least_rows: int,
    at_once: int,
) -> list[tuple[slice, list[slice]]]:
    (rows, n_latents), (block, width), (scratch, bytes_an_entry, bytes_a_row) = sizes, blocks, room
    most_rows = -(-rows // block)
    least = min(most_rows * block, least_rows)
    most_latents = min(most_latents, int((scratch / least - bytes_a_row) / bytes_an_entry))
    latents = _chunks(n_latents, width, most_latents, max(1, min(most_rows, least_rows // block)), at_once)
    widest = -(-(latents[0].stop - latents[0].start) // width)
    most = int(scratch / (widest * width * bytes_an_entry + bytes_a_row))
    # Where one block is too many, fewer rows: a tile is then not full.
    of_rows = _chunks(rows, block, most, widest, at_once) if most >= block else row_chunks(rows, 1, most)
    return [(part, of_rows) for part in latents]


def _chunks(n: int, block: int, most: int, others: int, at_once: int) -> list[slice]:
    """n in chunks of whole blocks, at most `most` (but one block): all at once, or those that leave the fewest
    multiprocessors without a tile in the end, where each block has `others` tiles."""
    blocks, most = -(-n // block), max(1, most // block)
    if blocks > most:
        sizes = range(most, most // 2, -1)
        blocks = min(sizes, key=lambda size: -(-size * others // at_once) / (size * others))
    step = blocks * block
    return [slice(start, min(n, start + step)) for start in range(0, n, step)]


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def tile_sums(
    x,
    W,
    b_pre_ptr,
    first_row,
    first_latent,
    rows,
    n_latents,
    d,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_b_pre_d,
    DESCRIBED: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_LATENTS] dot products in fp32; what lies outside of x and W is 0. x and W are descriptors, or
    pointers. CENTRED: of x - b_pre."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    column = tl.arange(0, BLOCK_D).to(tl.int64)  # columns of a transposed tensor may be 2^31 elements apart
    if not DESCRIBED:
        row = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        latent = (first_latent + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
        x_ptrs = x + row[:, None] * stride_x_row + column[None, :] * stride_x_d
        W_ptrs = W + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d
        step = tl.full([], BLOCK_D, tl.int64)
    for start in range(0, d, BLOCK_D):
        if DESCRIBED:
            x_tile = x.load([first_row, start])  # [BLOCK_ROWS, BLOCK_D]
            W_tile = W.load([first_latent, start])  # [BLOCK_LATENTS, BLOCK_D]
        else:
            inside = (column < d - start)[None, :]
            x_tile = tl.load(x_ptrs, mask=(row < rows)[:, None] & inside, other=0.0)
            W_tile = tl.load(W_ptrs, mask=(latent < n_latents)[:, None] & inside, other=0.0)
            x_ptrs += step * stride_x_d
            W_ptrs += step * stride_W_d
        if CENTRED:
            b_pre = tl.load(b_pre_ptr + (start + column) * stride_b_pre_d, mask=column < d - start, other=0.0)
            x_tile -= b_pre[None, :]
        total = tl.dot(x_tile, tl.trans(W_tile), total, input_precision=PRECISION)
    return total
