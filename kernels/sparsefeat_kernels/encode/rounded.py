"""An encoder rounded to bf16, and how far its products can be from the true ones. The prefilters of a CPU stand on it.

A processor with bf16 matrix instructions multiplies bf16 three to five times as fast as fp32. With x' = x - b_pre,
~ for rounding to bf16, |.| for 2-norms, u = 2^-24, and p the product as bf16 stores it:

    |p - (x'.w + b)|  <=  |x' - x'~| |w|  +  |x'~| |w - w~|  +  2^-8 |p|              operands, result
                          +  (d + 8) u (|x'~| |w~| + |b|)                                 accumulation in fp32
                          +  2^-126 (sqrt(d) (|x'~| + |w~|) + 2 d + 1)                    denormals that were flushed

with |w - w~| as it is found, and at most 2^-8 |w| + 2^-134 sqrt(d): half of a bf16's last place. (Of random weights it is
0.4 times that; bf16 weights lose nothing.) The bias takes part in the product, as three more columns (a float is the sum
of three bf16), so that no pass over the [rows, n_latents] tensor adds it. Norms are fp32 sums, rounded up by what such a
sum can have lost: (d + 8) u of it, and 2^-63 sqrt(d) where squares underflow.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import implementation
from ..products import pair_products, product, quiet_about_csr
from ..threads import Task, each, pieces, shares, threads, together

__all__ = [
    "RoundedEncoder",
    "RoundedRows",
    "bf16_products",
    "bias_columns",
    "can_prefilter",
    "encoder_bounds",
    "norm_rounded_up",
    "pays_to_round",
    "round_encoder",
    "rounded_up",
    "rounded_width",
    "rounding_of_weights",
]

BIAS_COLUMNS = 3
ALIGNMENT = 32  # bf16 columns: a cache line
LARGEST = 1e38  # of |x'| |w| + |b|: beyond, a partial sum may overflow
SMALLEST_PRODUCT = 1 << 16  # multiplications; torch makes smaller products by itself, summed as it likes
# Latents rounded at a time, and half-precision latents widened at a time to rescore.
ROUNDED_TILE_BYTES = 4 << 20
WIDENED_TILE_BYTES = 4 << 20
# What pays to round the weights for: at 16 x 1,280 x 20,480 the prefilter takes 0.7 of the plain path's time (half the
# rows: 1.0), at 64 x 768 x 3,072 1.0; at a width of 64 selection is nearly all there is.
ROUNDED_ROWS, ROUNDED_WIDTH, ROUNDED_PRODUCT = 16, 128, 150_000_000
MEASURED_ROWS = 512  # a pass over the weights pays: fewer survivors to rescore


@functools.cache
def bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware, with sums in fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is not None and ask() for ask in asked)


def can_prefilter(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether rows like these go through a prefilter on the CPU."""
    on_cpu = x.dtype in dtypes and x.device.type == "cpu" and implementation("topk_encode", x) == "torch"
    return on_cpu and bf16_products() and getattr(torch.backends.mkldnn, "enabled", True)


def pays_to_round(x: Tensor, W_enc: Tensor) -> bool:
    """Whether a product with rows like these is worth rounding W_enc for, which costs as much as some 10 rows."""
    rows, d = x.shape
    large = rows >= ROUNDED_ROWS and d >= ROUNDED_WIDTH and rows * d * len(W_enc) >= ROUNDED_PRODUCT
    return large and can_prefilter(x, (torch.float32, torch.bfloat16, torch.float16))


def rounded_width(d: int) -> int:
    """Columns of the rounded weights of an encoder of width d."""
    return -(-(d + BIAS_COLUMNS) // ALIGNMENT) * ALIGNMENT


def bias_columns(bias: Tensor) -> tuple[Tensor, Tensor]:
    """A bias (fp64 [n_latents]) as BIAS_COLUMNS columns of bf16, and what of it they do not hold."""
    rest, columns = bias.clone(), torch.empty(len(bias), BIAS_COLUMNS, dtype=torch.bfloat16)
    for column in columns.unbind(1):
        column.copy_(rest)
        rest -= column  # exact: what rounding left
    return columns, rest


def round_into(low: Tensor, W_enc: Tensor, columns: Tensor) -> None:
    """W_enc and the bias's columns into low [n_latents, width], whose last columns are zeros."""
    d = W_enc.shape[1]
    low[:, :d] = W_enc
    low[:, d : d + BIAS_COLUMNS] = columns


def rounding_of_weights(low: Tensor, W_enc: Tensor, columns: Tensor) -> list[Task]:
    """`round_into`, as tasks."""
    return each(lambda some: round_into(low[some], W_enc[some], columns[some]), shares(len(W_enc), threads()))


def encoder_bounds(
    W_enc: Tensor, bias: Tensor, rest: Tensor, width: int, out: Tensor, measured: bool = True
) -> list[Task]:
    """fp32 [3, n_latents] into `out`: p is within |x' - x'~| out[0] + |x'~| out[1] + out[2] + 2^-8 |p|. As tasks.

    measured: what the weights lost is found, in twice the time, not bounded.
    """
    root, accumulation, denormal = W_enc.shape[1] ** 0.5, (width + 8) * 2.0**-24, 2.0**-126

    def some(latents: slice) -> None:
        norm, lost = norms_and_losses(W_enc[latents], measured)
        kept = norm + lost
        out[0, latents] = rounded_up(norm)
        out[1, latents] = rounded_up(lost + accumulation * kept + denormal * root)
        out[2, latents] = rounded_up(
            rest[latents].abs() + accumulation * 1.01 * bias[latents].abs() + denormal * (root * kept + 2 * width + 1)
        )

    return each(some, shares(len(W_enc), threads()))


def rounded_up(x: Tensor) -> Tensor:
    """fp64 to fp32, never less than it was, with room for the rounding of what it is multiplied and added with."""
    return (x * (1 + 1e-5) + 2.0**-126).float()


def norms_and_losses(W: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    """fp64 [rows] each: norms of the rows of W, and of what rounding to bf16 takes from them, rounded up."""
    root = W.shape[1] ** 0.5
    if W.dtype == torch.bfloat16:
        norm = norm_rounded_up(W).double()
        return norm, torch.zeros_like(norm)
    norm = torch.empty(len(W), dtype=torch.float32)
    for start, part in widened_tiles(W):
        norm[start : start + len(part)] = norm_rounded_up(part)
    norm = norm.double()
    at_most = 2.0**-8 * norm + 2.0**-134 * root
    if not measured:
        return norm, at_most
    lost = torch.empty(len(W), dtype=torch.float32)
    tile = max(1, min(len(W), WIDENED_TILE_BYTES // (4 * W.shape[1])))
    low, difference = (torch.empty(tile, W.shape[1], dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    for start in range(0, len(W), tile):
        part = W[start : start + tile]
        rounded, left = low[: len(part)].copy_(part), difference[: len(part)]
        lost[start : start + tile] = norm_rounded_up(left.copy_(rounded).sub_(part))  # exact
    return norm, torch.minimum(lost.double(), at_most)


def norm_rounded_up(x: Tensor) -> Tensor:
    """fp32 norms of the rows of x [rows, d], fp32 or bf16, never less than the true ones."""
    d = x.shape[1]
    result = 2.0**-8 if x.dtype == torch.bfloat16 else 0.0  # its sums are in fp32 too: only they are rounded to bf16
    norm = torch.linalg.vector_norm(x, dim=1).float() * (1 + (d + 8) * 2.0**-24 + 1e-6 + result) + 2.0**-63 * d**0.5
    # Where d is 1 nothing is squared, and bf16 is infinite from 3.39e38.
    return norm.masked_fill_(norm > 3e38, torch.inf)


def widened_tiles(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows in fp32, a tile at a time; half precision in one buffer. (New memory for every tile costs more
    than what is done with it.)"""
    tile = max(1, min(len(x), WIDENED_TILE_BYTES // (4 * x.shape[1])))
    buffer = None if x.dtype == torch.float32 else torch.empty(tile, x.shape[1], dtype=torch.float32)
    for start in range(0, len(x), tile):
        part = x[start : start + tile]
        yield start, part if buffer is None else buffer[: len(part)].copy_(part)


class RoundedRows(NamedTuple):
    """Some rows of x: centred in fp32, rounded, and the norms that the bound is made of."""

    centred: Tensor  # fp32 [rows, d]
    low: Tensor  # bf16 [rows, width]
    size: Tensor  # [rows]: |x'~|
    lost: Tensor  # [rows]: |x' - x'~|
    provable: Tensor  # [rows] bool: no sum of the product can overflow, and no NaN is in it

    def part(self, some: slice) -> RoundedRows:
        return RoundedRows(*(tensor[some] for tensor in self))


@dataclass(frozen=True, eq=False)
class RoundedEncoder:
    """W_enc and a bias in bf16: kept whole, or rounded again, a tile of latents at a time, for every product. Work is
    given as tasks for `together`, and comes out the same however many threads share it."""

    W_enc: Tensor  # [n_latents, d]: fp32, bf16 or fp16
    columns: Tensor | None  # of `bias_columns`; None where low is whole
    low: Tensor | None  # bf16 [n_latents, width]; None where it is rounded again
    bounds: Tensor  # of `encoder_bounds`
    largest: tuple[float, float]  # the largest |w| and |bias|
    bias: Tensor | None = (
        None  # bf16 [n_latents], where both W_enc and the bias are bf16: then W_enc is multiplied itself
    )

    @property
    def width(self) -> int:
        d = self.W_enc.shape[1]
        return d if self.bias is not None else rounded_width(d)

    def room_for(self, rows: int, centred: Tensor | None = None) -> RoundedRows:
        """What `rounding` fills; centred: where that goes."""
        low = torch.zeros(rows, self.width, dtype=torch.bfloat16)
        centred = torch.empty(rows, self.W_enc.shape[1], dtype=torch.float32) if centred is None else centred
        size, lost = torch.empty(2, rows, dtype=torch.float32)
        return RoundedRows(centred, low, size, lost, torch.empty(rows, dtype=torch.bool))

    def rounding(self, x: Tensor, b_pre: Tensor, out: RoundedRows) -> list[Task]:
        d = x.shape[1]

        def some(rows: slice) -> None:
            centred, low, size, lost, provable = out.part(rows)
            torch.sub(x[rows].float(), b_pre.float(), out=centred)
            low[:, :d], low[:, d : d + BIAS_COLUMNS] = centred, 1
            kept = low[:, :d].float()
            size.copy_(norm_rounded_up(kept))
            lost.copy_(norm_rounded_up(kept.sub_(centred)))
            # Not so for NaN, and not for weights that are infinite in bf16: their norm is infinite in fp32.
            torch.lt(size * self.largest[0] + self.largest[1], LARGEST, out=provable)

        return each(some, shares(len(x), threads()))

    def product(self, rows: RoundedRows, out: Tensor) -> list[Task]:
        """x' W_enc^T + bias as bf16 stores it, into out [rows, n_latents]."""
        n_latents, d = self.W_enc.shape
        rounds = self.bias is None and self.low is None
        # Of equal size, and not below SMALLEST_PRODUCT.
        smallest = -(-SMALLEST_PRODUCT // (len(rows.low) * d))
        tile_bytes = ROUNDED_TILE_BYTES * min(1.0, 2 / threads())  # every thread has one
        of_a_tile = self.width if rounds else len(rows.low) if self.bias is not None else 0
        least = max(1, -(-2 * n_latents * of_a_tile // int(tile_bytes)))
        tiles = pieces(n_latents, smallest, least)
        longest = max(tile.stop - tile.start for tile in tiles)
        buffers: deque[Tensor] = deque()

        def some(tile: slice) -> None:
            to, W = out[:, tile], self.W_enc[tile]
            if self.bias is not None:
                to.copy_(product(rows.low, W, self.bias[tile]))
                return
            if self.low is not None:
                torch.mm(rows.low, self.low[tile].T, out=to)
                return
            try:
                buffer = buffers.pop()
            except IndexError:
                buffer = torch.zeros(longest, self.width, dtype=torch.bfloat16)
            low = buffer[: len(W)]
            assert self.columns is not None
            round_into(low, W, self.columns[tile])
            torch.mm(rows.low, low.T, out=to)
            buffers.append(buffer)

        return each(some, tiles)

    def rescoring(self, centred: Tensor, row: Tensor, latent: Tensor, out: Tensor) -> list[Task]:
        """x'[row] . W_enc[latent] of every pair in fp32, into out [pairs].

        Latent by latent: a row of W_enc then comes from memory once, and those of x' stay in the cache (28 ms instead
        of 98 for 201 of 16,384 latents of width 3,072 in each of 256 rows).
        """
        n_latents, d = self.W_enc.shape
        full = self.W_enc.dtype == torch.float32
        tiles = pieces(n_latents, least=1 if full else -(-4 * n_latents * d // WIDENED_TILE_BYTES))
        quiet_about_csr()
        # The pairs of each tile, and within it latent by latent.
        order = latent.int().argsort(stable=True)  # in half the time
        counts = torch.bincount(latent, minlength=n_latents).cumsum(0)
        ends = [int(counts[tile.stop - 1]) for tile in tiles[:-1]]

        def some(piece: tuple[slice, Tensor]) -> None:
            tile, pairs = piece
            if not len(pairs):
                return
            offsets = torch.zeros(tile.stop - tile.start + 1, dtype=torch.int64)
            counts = torch.bincount(latent.index_select(0, pairs) - tile.start, minlength=tile.stop - tile.start)
            torch.cumsum(counts, 0, out=offsets[1:])
            products = pair_products(self.W_enc[tile].float(), centred, offsets, row.index_select(0, pairs))
            out.scatter_(0, pairs, products)

        return each(some, zip(tiles, order.tensor_split(ends), strict=True))


def round_encoder(W_enc: Tensor, bias: Tensor, rows: int, keep_bytes: int = 0) -> RoundedEncoder:
    """W_enc [n_latents, d] and a bias (any floating dtype) for products with some number of rows in bf16; the rounded
    weights are kept when they take up to keep_bytes."""
    n_latents, width = len(W_enc), rounded_width(W_enc.shape[1])
    whole = bias.bfloat16() if W_enc.dtype == torch.bfloat16 else None
    if whole is not None and not torch.equal(whole.double(), bias.double()):
        whole = None
    bias = bias.double()
    columns, rest = (None, torch.zeros_like(bias)) if whole is not None else bias_columns(bias)
    bounds = torch.empty(3, n_latents, dtype=torch.float32)
    together(encoder_bounds(W_enc, bias, rest, width, bounds, rows >= MEASURED_ROWS))
    low = None
    if whole is None and 2 * n_latents * width <= keep_bytes:
        low = torch.zeros(n_latents, width, dtype=torch.bfloat16)
        together(rounding_of_weights(low, W_enc, columns))
        columns = None
    return RoundedEncoder(W_enc, columns, low, bounds, (float(bounds[0].max()), float(bias.abs().max())), whole)
