"""Kernels that are timed beside the package's and are not in it: what a card must show before one replaces the other.

`candidates_encode`: topk_encode (ReLU) in two launches. The product is persistent, reads its tiles through tensor
descriptors and keeps the three best of every group of 16 latents, all of one thread; one or two warps a row then bisect
for a lower bound of the k-th largest, collect the few groups that reach it and sort only what those kept. A row is
proved when no group's third best reaches its k-th. What is left out of a prototype: NaN, other selections, rows without
a proof (they are said, not computed again).

`product_in_parts`: an fp32 product on the matrix units, each factor split into three bf16 parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparsefeat_kernels.dispatch import jit, next_power_of_2, tl
from torch import Tensor

GROUP = 16  # latents of one thread of a 64-column stretch: 8 octets, 2 neighbours of each
KEPT = 3
COUNTED = 512  # maxima that are bisected: three counts of them share an int32


@dataclass(frozen=True)
class Tile:
    """Sizes of the product; `programs` of them on a multiprocessor at once."""

    BLOCK_ROWS: int
    BLOCK_LATENTS: int
    BLOCK_D: int
    num_warps: int
    num_stages: int
    programs: int


# The large tile has the cheaper loop, the small one leaves room for a second program, whose loop hides the epilogue.
LARGE = Tile(128, 256, 64, 8, 4, 1)
SMALL = Tile(128, 128, 64, 8, 3, 2)


@jit
def _halves(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    """Even and odd places of [ROWS, GROUPS, N]."""
    return tl.split(tl.reshape(x, [ROWS, GROUPS, N // 2, 2]))


@jit
def _merge_thirds(a1, a2, a3, b1, b2, b3):
    """The three largest of two descending triples."""
    first = tl.maximum(a1, b1)
    second = tl.maximum(tl.minimum(a1, b1), tl.maximum(a2, b2))
    third = tl.maximum(tl.maximum(tl.minimum(a1, b2), tl.minimum(a2, b1)), tl.maximum(a3, b3))
    return first, second, third


@jit
def _prototype_product_kernel(
    x_desc,
    W_desc,
    bias_ptr,
    kept_ptr,
    rows,
    n_latents,
    d,
    n_groups,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """kept [rows, 3, n_groups]: ordered bits of the three best of every group, the last four the complement of a place."""
    STRETCHES: tl.constexpr = BLOCK_LATENTS // 64
    GROUPS: tl.constexpr = STRETCHES * 4
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    tiles = row_blocks * tl.cdiv(n_latents, BLOCK_LATENTS)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        first_row = (tile % row_blocks) * BLOCK_ROWS
        block = tile // row_blocks
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, BLOCK_LATENTS)
        latent = block * BLOCK_LATENTS + column
        total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
        for start in range(0, d, BLOCK_D):
            x = x_desc.load([first_row, start])  # [BLOCK_ROWS, BLOCK_D]
            w = W_desc.load([block * BLOCK_LATENTS, start])  # [BLOCK_LATENTS, BLOCK_D]
            total = tl.dot(x, w.T, total, input_precision="ieee")
        bias = tl.load(bias_ptr + latent, mask=latent < n_latents, other=float("-inf"))
        a = total + bias[None, :]  # [BLOCK_ROWS, BLOCK_LATENTS]
        bits = a.to(tl.int32, bitcast=True)
        place = 15 - (((column // 8) % 8) * 2 + column % 2)
        key = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -16) | place[None, :]
        key = tl.permute(tl.reshape(key, [BLOCK_ROWS, STRETCHES, 8, 4, 2]), (0, 1, 3, 2, 4))
        even, odd = _halves(tl.reshape(key, [BLOCK_ROWS, GROUPS, 16]), BLOCK_ROWS, GROUPS, 16)
        high, low = tl.maximum(even, odd), tl.minimum(even, odd)  # [BLOCK_ROWS, GROUPS, 8]
        high_a, high_b = _halves(high, BLOCK_ROWS, GROUPS, 8)
        low_a, low_b = _halves(low, BLOCK_ROWS, GROUPS, 8)
        first = tl.maximum(high_a, high_b)
        lower, upper = tl.minimum(high_a, high_b), tl.maximum(low_a, low_b)
        second, third = tl.maximum(lower, upper), tl.minimum(lower, upper)
        a1, b1 = _halves(first, BLOCK_ROWS, GROUPS, 4)
        a2, b2 = _halves(second, BLOCK_ROWS, GROUPS, 4)
        a3, b3 = _halves(third, BLOCK_ROWS, GROUPS, 4)
        first, second, third = _merge_thirds(a1, a2, a3, b1, b2, b3)
        a1, b1 = _halves(first, BLOCK_ROWS, GROUPS, 2)
        a2, b2 = _halves(second, BLOCK_ROWS, GROUPS, 2)
        a3, b3 = _halves(third, BLOCK_ROWS, GROUPS, 2)
        first, second, third = _merge_thirds(a1, a2, a3, b1, b2, b3)
        group = block * GROUPS + tl.arange(0, GROUPS)
        out = kept_ptr + row[:, None].to(tl.int64) * (3 * n_groups) + group[None, :]
        inside = (row < rows)[:, None] & (group < n_groups)[None, :]
        tl.store(out, tl.reshape(first, [BLOCK_ROWS, GROUPS]), mask=inside)
        tl.store(out + n_groups, tl.reshape(second, [BLOCK_ROWS, GROUPS]), mask=inside)
        tl.store(out + 2 * n_groups, tl.reshape(third, [BLOCK_ROWS, GROUPS]), mask=inside)


@jit
def _kth_bound(x, k):
    """A lower bound of the k-th largest of int32 [N <= 1023]: its first 20 bits, two at a time, three counts a sum."""
    bound = tl.full([], -0x80000000, tl.int32)
    for bit in tl.static_range(0, 20, 2):
        step = 1 << (30 - bit)
        one, two, three = bound + step, bound + 2 * step, bound + 3 * step
        counts = (x >= one).to(tl.int32) + ((x >= two).to(tl.int32) << 10) + ((x >= three).to(tl.int32) << 20)
        counts = tl.sum(counts, axis=0)
        low = tl.where((counts & 1023) >= k, one, bound)
        bound = tl.where((counts >> 20) >= k, three, tl.where(((counts >> 10) & 1023) >= k, two, low))
    return bound


@jit
def _entry(kept, group):
    """int64 that sorts by the kept value, equal ones by lower latent first."""
    place = 15 - (kept & 15)
    latent = (group // 4) * 64 + (place // 2) * 8 + (group % 4) * 2 + place % 2
    return (kept.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@jit
def _prototype_select_kernel(
    kept_ptr,
    alive_ptr,
    values_ptr,
    indices_ptr,
    proved_ptr,
    k,
    n_groups,
    BLOCK_GROUPS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_ALIVE: tl.constexpr,
):
    """One row: its code, and whether it is proved."""
    row = tl.program_id(0).to(tl.int64)
    kept_ptr += row * (3 * n_groups)
    alive_ptr += row * BLOCK_ALIVE
    group = tl.arange(0, BLOCK_GROUPS)
    best = tl.load(kept_ptr + group, mask=group < n_groups, other=-0x80000000)  # [BLOCK_GROUPS]
    bound = _kth_bound(tl.max(tl.reshape(best, [COUNTED, BLOCK_GROUPS // COUNTED]), axis=1), k)
    reaches = (best >= bound) & (group < n_groups)
    place = tl.cumsum(reaches.to(tl.int32), axis=0) - 1
    n_alive = tl.sum(reaches.to(tl.int32), axis=0)
    tl.store(alive_ptr + place, group, mask=reaches & (place < BLOCK_ALIVE))
    tl.debug_barrier()  # other lanes read what these wrote
    slot = tl.arange(0, BLOCK_ALIVE)
    inside = slot < n_alive
    group = tl.load(alive_ptr + slot, mask=inside, other=0)  # [BLOCK_ALIVE]
    first = tl.load(kept_ptr + group, mask=inside, other=-0x80000000)
    second = tl.load(kept_ptr + n_groups + group, mask=inside, other=-0x80000000)
    third = tl.load(kept_ptr + 2 * n_groups + group, mask=inside, other=-0x80000000)
    keys = tl.reshape(tl.join(_entry(first, group), _entry(second, group)), [2 * BLOCK_ALIVE])
    keys = tl.sort(keys, descending=True)
    slot = tl.arange(0, 2 * BLOCK_ALIVE)
    last = (tl.min(tl.where(slot < k, keys, 0x7FFFFFFFFFFFFFFF), axis=0) >> 32).to(tl.int32)
    proved = (tl.max(third, axis=0) < last) & (n_alive <= BLOCK_ALIVE)
    latent = (0x7FFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)
    ordered = (keys >> 32).to(tl.int32)
    value = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    tl.store(values_ptr + row * k + slot, tl.maximum(value, 0.0), mask=slot < k)
    tl.store(indices_ptr + row * k + slot, latent, mask=slot < k)
    tl.store(proved_ptr + row, proved.to(tl.int8))


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def candidates_encode(
    x: Tensor, W_enc: Tensor, bias: Tensor, k: int, tile: Tile = LARGE
) -> tuple[Tensor, Tensor, Tensor]:
    """values, indices [rows, k] of relu(x W_enc^T + bias), and which rows are proved. x, W_enc: contiguous, d a multiple
    of 16 bytes; bias: fp32 [n_latents], b_enc - W_enc b_pre, which is made once."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    (rows, d), n_latents = x.shape, len(W_enc)
    n_groups = -(-n_latents // tile.BLOCK_LATENTS) * (tile.BLOCK_LATENTS // GROUP)
    block_groups = next_power_of_2(n_groups)
    counted = min(COUNTED, block_groups)
    block_alive = next_power_of_2(2 * k)
    if k > counted:
        raise ValueError(f"k must be at most {counted} for {n_latents} latents, got {k}")
    kept = x.new_empty(rows, KEPT, n_groups, dtype=torch.int32)
    alive = x.new_empty(rows, block_alive, dtype=torch.int32)
    values, indices = x.new_empty(rows, k, dtype=torch.float32), x.new_empty(rows, k, dtype=torch.int32)
    proved = x.new_empty(rows, dtype=torch.int8)
    x_desc = TensorDescriptor.from_tensor(x, [tile.BLOCK_ROWS, tile.BLOCK_D])
    W_desc = TensorDescriptor.from_tensor(W_enc, [tile.BLOCK_LATENTS, tile.BLOCK_D])
    tiles = -(-rows // tile.BLOCK_ROWS) * -(-n_latents // tile.BLOCK_LATENTS)
    _prototype_product_kernel[(min(tiles, tile.programs * _multiprocessors(x.device)),)](
        x_desc, W_desc, bias, kept, rows, n_latents, d, n_groups,
        BLOCK_ROWS=tile.BLOCK_ROWS, BLOCK_LATENTS=tile.BLOCK_LATENTS, BLOCK_D=tile.BLOCK_D,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    _prototype_select_kernel[(rows,)](
        kept, alive, values, indices, proved, k, n_groups, BLOCK_GROUPS=block_groups, COUNTED=counted,
        BLOCK_ALIVE=block_alive, num_warps=1 if block_groups <= 2048 else 2,
    )  # fmt: skip
    return values, indices, proved.bool()


@jit
def _prototype_parts_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    out_ptr,
    rows,
    n_latents,
    d,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out [rows, n_latents] = x W^T + bias of contiguous fp32 factors."""
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = ((tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    latent = ((tl.program_id(0) // row_blocks) * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    for start in range(0, d, BLOCK_D):
        inside = (start + column < d)[None, :]
        x = tl.load(x_ptr + row[:, None] * d + start + column[None, :], mask=(row < rows)[:, None] & inside, other=0.0)
        w = tl.load(
            W_ptr + latent[:, None] * d + start + column[None, :],
            mask=(latent < n_latents)[:, None] & inside,
            other=0.0,
        )
        total = tl.dot(x, tl.trans(w), total, input_precision=PRECISION)
    bias = tl.load(bias_ptr + latent, mask=latent < n_latents, other=0.0)
    inside = (row < rows)[:, None] & (latent < n_latents)[None, :]
    tl.store(out_ptr + row[:, None] * n_latents + latent[None, :], total + bias[None, :], mask=inside)


def product_in_parts(x: Tensor, W: Tensor, bias: Tensor, precision: str = "bf16x6") -> Tensor:
    """x W^T + bias in fp32. x, W: contiguous."""
    (rows, d), n_latents = x.shape, len(W)
    out = x.new_empty(rows, n_latents)
    _prototype_parts_kernel[(-(-rows // 128) * -(-n_latents // 128),)](
        x, W, bias, out, rows, n_latents, d, PRECISION=precision,
        BLOCK_ROWS=128, BLOCK_LATENTS=128, BLOCK_D=32, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out
