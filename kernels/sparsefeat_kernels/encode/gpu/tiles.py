"""The product of a GPU's encoders: persistent programs that read their tiles through tensor descriptors.

On a GPU with a copy engine (sm_90 and later) a descriptor's tile is one instruction; elsewhere the compiler makes loads of
it. Half-precision inputs are not centred, since x - b_pre rounded to half precision would lose more than the product: b_pre
is in the bias (product.py). fp32 rows are, as they leave shared memory, and are multiplied on the matrix units, each factor
split into three bf16 parts and six of the nine products summed: what is left out is 2^-26 of a product and less, which the
bound of an IEEE sum (2^-24 of each) has room for. SPARSEFEAT_IEEE=1 asks for fused multiply-adds instead.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...dispatch import INTERPRETED, TRITON_VERSION, TensorDescriptor, backend, jit, row_chunks, tl

__all__ = ["LARGE_TILE", "SCRATCH_BYTES", "chunks_of", "default_tile", "described", "programs_of", "tile_sums"]

SCRATCH_BYTES = 58 << 20  # what one call holds beside its inputs and outputs
# Fewer rows at once, and reading W would take a fifth of the time that multiplying takes (H100: 3 TB/s, 700 TFLOP/s).
LEAST_ROWS = 1024
IEEE = os.environ.get("SPARSEFEAT_IEEE", "0") not in ("", "0")
# With four stages 192 KiB of shared memory, which an H100 has: the cheapest loop a product there can have.
LARGE_TILE = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 256, "BLOCK_D": 64, "num_warps": 8, "num_stages": 4}


def default_tile(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages without a tuning table: within the 99 KiB of shared memory that the smaller GPUs of
    each generation have (AMD: 64 KiB)."""
    few = backend() == "hip"
    if dtype != torch.float32:
        return {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 2 if few else 3}
    return {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 128, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}


def precision(dtype: torch.dtype) -> str:
    """Of the product, for `tl.dot`. The interpreter has no parts, nor have versions before 3.6."""
    parts = dtype == torch.float32 and not (IEEE or INTERPRETED) and TRITON_VERSION >= (3, 6)
    return "bf16x6" if parts else "ieee"


def readable(tensor: Tensor) -> bool:
    """Whether a descriptor can read tiles of [n, d]: columns side by side, rows that begin at multiples of 16 bytes."""
    (n, d), whole = tensor.shape, 16 // tensor.itemsize
    rows = n == 1 or (tensor.stride(0) >= d and tensor.stride(0) % whole == 0)
    return rows and (d == 1 or tensor.stride(1) == 1) and tensor.data_ptr() % 16 == 0


def copy_bytes_a_row(tensor: Tensor) -> int:
    """Of what `described` copies: 0 where a descriptor can read the tensor."""
    return 0 if readable(tensor) else 16 * -(-tensor.shape[1] * tensor.itemsize // 16)


def described(tensor: Tensor, block: list[int]) -> Any:
    """A descriptor of tiles of [n, d], of a copy where it cannot be read."""
    (n, d), whole = tensor.shape, 16 // tensor.itemsize
    padded = -(-d // whole) * whole
    if not readable(tensor):
        tensor = tensor.new_empty(n, padded)[:, :d].copy_(tensor)
    return TensorDescriptor(tensor, [n, d], [padded if n == 1 else tensor.stride(0), 1], block)


def programs_of(rows: int, n_latents: int, tile: Mapping[str, int], device: torch.device) -> int:
    """Persistent programs: as many as run at once, or one for every tile where these are fewer."""
    tiles = -(-rows // tile["BLOCK_ROWS"]) * -(-n_latents // tile["BLOCK_LATENTS"])
    return min(tiles, _multiprocessors(device) * (1 if tile["BLOCK_LATENTS"] > 128 else 2))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def chunks_of(
    x: Tensor, W: Tensor, tile: Mapping[str, int], bytes_an_entry: float, bytes_a_row: int, most_latents: int
) -> list[tuple[slice, list[slice]]]:
    """Chunks of at most `most_latents` latents, and of the rows of each, whose scratch is within SCRATCH_BYTES, copies that
    `described` makes included: as many latents as leave room for LEAST_ROWS rows."""
    block, width = tile["BLOCK_ROWS"], tile["BLOCK_LATENTS"]
    scratch, copied = SCRATCH_BYTES, copy_bytes_a_row(W)
    bytes_a_row += copy_bytes_a_row(x)
    if copied:
        scratch //= 2
        most_latents = min(most_latents, scratch // copied)
    least = min(-(-x.shape[0] // block) * block, LEAST_ROWS)
    most_latents = min(most_latents, int((scratch / least - bytes_a_row) / bytes_an_entry))
    latents = _whole(W.shape[0], width, most_latents)
    widest = -(-latents[0].stop // width) * width
    of_rows = _whole(x.shape[0], block, int(scratch / (widest * bytes_an_entry + bytes_a_row)))
    return [(part, of_rows) for part in latents]


def _whole(n: int, block: int, most: int) -> list[slice]:
    """n in as few chunks of whole blocks as `most` allows, of equal size but the last."""
    chunks = row_chunks(-(-n // block), 1, max(1, most // block))
    return [slice(chunk.start * block, min(n, chunk.stop * block)) for chunk in chunks]


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def tile_sums(
    x_desc,
    W_desc,
    b_pre_ptr,
    first_row,
    first_latent,
    d,
    stride_b_pre_d,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_ROWS, BLOCK_LATENTS] dot products in fp32; what lies outside of x and W is 0. CENTRED: of x - b_pre."""
    total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    for start in range(0, d, BLOCK_D):
        x = x_desc.load([first_row, start])  # [BLOCK_ROWS, BLOCK_D]
        w = W_desc.load([first_latent, start])  # [BLOCK_LATENTS, BLOCK_D]
        if CENTRED:
            column = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
            x -= tl.load(b_pre_ptr + column * stride_b_pre_d, mask=column < d, other=0.0)[None, :]
        total = tl.dot(x, w.T, total, input_precision=PRECISION)
    return total
