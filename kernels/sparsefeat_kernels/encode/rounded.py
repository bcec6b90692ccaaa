"""An encoder rounded to bf16, and how far its products can be from the true ones. The CPU's prefilters stand on it; that
of a GPU (gpu/prefilter.py) takes the norms from here and has a bound of its own for the sums.

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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import implementation
from ..products import pair_products

__all__ = [
    "RoundedEncoder",
    "bf16_products",
    "bias_columns",
    "can_prefilter",
    "encoder_bounds",
    "norm_rounded_up",
    "pays_to_round",
    "round_encoder",
    "round_into",
    "rounded_up",
    "rounded_width",
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


def encoder_bounds(W_enc: Tensor, bias: Tensor, rest: Tensor, width: int, out: Tensor, measured: bool = True) -> Tensor:
    """fp32 [3, n_latents] into `out`: p is within |x' - x'~| out[0] + |x'~| out[1] + out[2] + 2^-8 |p|.

    measured: what the weights lost is found, in twice the time, not bounded.
    """
    root, accumulation, denormal = W_enc.shape[1] ** 0.5, (width + 8) * 2.0**-24, 2.0**-126
    norm, lost = norms_and_losses(W_enc, measured)
    kept = norm + lost
    out[0] = rounded_up(norm)
    out[1] = rounded_up(lost + accumulation * kept + denormal * root)
    out[2] = rounded_up(rest.abs() + accumulation * 1.01 * bias.abs() + denormal * (root * kept + 2 * width + 1))
    return out


def rounded_up(x: Tensor) -> Tensor:
    """fp64 to fp32, never less than it was, with room for the rounding of what it is multiplied and added with."""
    return (x * (1 + 1e-5) + 2.0**-126).float()


def norms_and_losses(W: Tensor, measured: bool) -> tuple[Tensor, Tensor]:
    """fp64 [rows] each: norms of the rows of W, and of what rounding to bf16 takes from them, rounded up."""
    root = W.shape[1] ** 0.5
    norm = torch.empty(len(W))
    for start, part in widened_tiles(W):
        norm[start : start + len(part)] = norm_rounded_up(part)
    norm = norm.double()
    if W.dtype == torch.bfloat16:
        return norm, torch.zeros_like(norm)
    at_most = 2.0**-8 * norm + 2.0**-134 * root
    if not measured:
        return norm, at_most
    lost = torch.empty(len(W))
    tile = max(1, min(len(W), WIDENED_TILE_BYTES // (4 * W.shape[1])))
    low, difference = torch.empty(tile, W.shape[1], dtype=torch.bfloat16), torch.empty(tile, W.shape[1])
    for start in range(0, len(W), tile):
        part = W[start : start + tile]
        rounded, left = low[: len(part)].copy_(part), difference[: len(part)]
        lost[start : start + tile] = norm_rounded_up(left.copy_(rounded).sub_(part))  # exact
    return norm, torch.minimum(lost.double(), at_most)


def norm_rounded_up(x: Tensor) -> Tensor:
    """fp32 norms of the rows of x [rows, d], never less than the true ones."""
    d = x.shape[1]
    norm = torch.linalg.vector_norm(x, dim=1) * (1 + (d + 8) * 2.0**-24 + 1e-6) + 2.0**-63 * d**0.5
    # Where d is 1 nothing is squared, and bf16 is infinite from 3.39e38.
    return norm.masked_fill_(norm > 3e38, torch.inf)


def widened_tiles(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """First row and rows in fp32, a tile at a time; half precision in one buffer. (New memory for every tile costs more
    than what is done with it.)"""
    tile = max(1, min(len(x), WIDENED_TILE_BYTES // (4 * x.shape[1])))
    buffer = None if x.dtype == torch.float32 else torch.empty(tile, x.shape[1])
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


@dataclass(frozen=True, eq=False)
class RoundedEncoder:
    """W_enc and a bias in bf16: kept whole, or rounded again, a tile of latents at a time, for every product."""

    W_enc: Tensor  # [n_latents, d]: fp32, bf16 or fp16
    columns: Tensor | None  # of `bias_columns`; None where low is whole
    low: Tensor  # bf16 [n_latents, width], or room for one tile
    bounds: Tensor  # of `encoder_bounds`
    largest: tuple[float, float]  # the largest |w| and |bias|
    bias: Tensor | None = (
        None  # bf16 [n_latents], where both W_enc and the bias are bf16: then W_enc is multiplied itself
    )

    def rows(self, x: Tensor, b_pre: Tensor) -> RoundedRows:
        centred = x.float() - b_pre.float()
        d = centred.shape[1]
        low = torch.zeros(len(x), self.low.shape[1], dtype=torch.bfloat16)
        low[:, :d], low[:, d : d + BIAS_COLUMNS] = centred, 1
        kept = low[:, :d].float()
        size, lost = norm_rounded_up(kept), norm_rounded_up(kept.sub_(centred))
        # Not so for NaN, and not for weights that are infinite in bf16: their norm is infinite in fp32.
        provable = size * self.largest[0] + self.largest[1] < LARGEST
        return RoundedRows(centred, low, size, lost, provable)

    def product(self, rows: RoundedRows, out: Tensor) -> Tensor:
        """x' W_enc^T + bias as bf16 stores it, into out [rows, n_latents]."""
        n_latents, tile = self.W_enc.shape[0], self.low.shape[0]
        if self.bias is not None:
            return torch.addmm(self.bias, rows.low[:, : self.W_enc.shape[1]], self.W_enc.T, out=out)
        if self.columns is None:
            return torch.mm(rows.low, self.low.T, out=out)
        tiles = -(-n_latents // tile)
        for i in range(tiles):  # of equal size: SMALLEST_PRODUCT
            part = slice(n_latents * i // tiles, n_latents * (i + 1) // tiles)
            low = self.low[: part.stop - part.start]
            round_into(low, self.W_enc[part], self.columns[part])
            torch.mm(rows.low, low.T, out=out[:, part])
        return out

    def exact(self, centred: Tensor, row: Tensor, latent: Tensor) -> Tensor:
        """x'[row] . W_enc[latent] of every pair in fp32.

        Latent by latent: a row of W_enc then comes from memory once, and those of x' stay in the cache (28 ms instead
        of 98 for 201 of 16,384 latents of width 3,072 in each of 256 rows).
        """
        n_latents = len(self.W_enc)
        order = latent.argsort(stable=True)
        rows = row[order]
        offsets = torch.zeros(n_latents + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(latent, minlength=n_latents), 0, out=offsets[1:])
        a = torch.empty(len(row))
        if self.W_enc.dtype == torch.float32:
            a[order] = pair_products(self.W_enc, centred, offsets, rows)
            return a
        for start, W in widened_tiles(self.W_enc):
            of_tile = offsets[start : start + len(W) + 1]
            some = slice(int(of_tile[0]), int(of_tile[-1]))
            a[order[some]] = pair_products(W, centred, of_tile - some.start, rows[some])
        return a


def round_encoder(W_enc: Tensor, bias: Tensor, rows: int, keep_bytes: int = 0) -> RoundedEncoder:
    """W_enc [n_latents, d] and a bias (any floating dtype) for products with some number of rows in bf16; the rounded
    weights are kept when they take up to keep_bytes."""
    n_latents, width = len(W_enc), rounded_width(W_enc.shape[1])
    whole = bias.bfloat16() if W_enc.dtype == torch.bfloat16 else None
    if whole is not None and not torch.equal(whole.double(), bias.double()):
        whole = None
    tile = 1 if whole is not None else n_latents
    if whole is None and 2 * n_latents * width > keep_bytes:
        tile = -(-n_latents // -(-2 * n_latents * width // ROUNDED_TILE_BYTES))  # as many tiles, of equal size
    low = torch.zeros(tile, width, dtype=torch.bfloat16)
    bias = bias.double()
    columns: Tensor | None
    columns, rest = bias_columns(bias)
    bounds = encoder_bounds(W_enc, bias, rest, width, torch.empty(3, n_latents), rows >= MEASURED_ROWS)
    if tile == n_latents:
        round_into(low, W_enc, columns)
        columns = None
    return RoundedEncoder(W_enc, columns, low, bounds, (float(bounds[0].max()), float(bias.abs().max())), whole)
