"""The certified prefilter on a GPU: fp32 rows through a bf16 product on the matrix units, survivors rescored in fp32.

The idea and most of the bound are those of the CPU's (rounded.py, survivors.py). On a GPU an IEEE fp32 product runs on the plain units, at a tenth of
the matrix units' rate or less. Per chunk of rows, each step one launch, and the host waits for none:

    1. rows        x' = x - b_pre, x' rounded to bf16, and the norms of what was kept and lost
    2. product     bf16, sums in fp32, with the largest value of every group of latents (design A's kernel)
    3. groups      the k-th largest lower bound of the groups' largest values: at least k entries reach it. Groups whose
                   upper bound reaches it are alive. A row with too many goes on the list
    4. entries     entries of these groups whose own upper bound reaches it survive. Again too many: the list
    5. rescore     fp32 dot products of the survivors with x'
    6. finish      their k largest
    7. the list    rows without a proof are computed plainly, by design A's two kernels over the rows of the list: when it
                   is empty their programs end at once

The bound differs from the CPU's in three things: the product is kept in fp32, so nothing is lost in storing it; b_enc
is added in fp32; and matrix units add otherwise than IEEE arithmetic does. They align the products of a step, and the sum
so far, to the largest exponent among them and cut off what is below its last bits (Fasi, Higham, Mikaitis, Pranesh,
"Numerical behavior of NVIDIA tensor cores", PeerJ CS 2021). Every one of the d products, and every sum so far, of which
there are fewer than d / 4, loses less than 2^-23 of the largest magnitude, which is at most |x'~| |w~|: together less than
2.5 (d + 8) u |x'~| |w~|, with u = 2^-24. The bound allows MATRIX_UNITS = 4 times (d + 8) u, of which the rest is for the
roundings of the bound itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch import jit_over_rows, next_power_of_2, row_chunks, tl
from ..keys import entry_key, largest_keys, ordered, store_code
from ..product import TRITON_SCRATCH_BYTES, default_product
from ..rounded import LARGEST, norm_rounded_up, rounded_up
from .scratch import MAX_KEYS, SelectSizes, launch_product, launch_select

__all__ = ["GROUPS_A_K", "PrefilterSizes", "gpu_weights", "topk_prefiltered_triton"]

LOW = torch.bfloat16
STRIDE = 64  # neighbours in the bf16 copy are latents n_latents / 64 apart: of trained orders none survives in a group
GROUPS = (16, 32, 64, 8)
GROUPS_A_K = 8  # at least so many groups for each of the k: fewer, and two of the k often share a group
MOST_GROUPS = 8192  # of which one program finds the k best
SURVIVORS = 8  # a row with more than so many groups, or entries, a k alive is computed plainly
MATRIX_UNITS = 4
TILE = 4096  # latents whose loss is measured at a time


def gpu_weights(W_enc: Tensor, b_enc: Tensor) -> tuple[Tensor, Tensor]:
    """low [n_latents, d] and bounds [4, n_latents], for `PreparedEncoder`: bf16 weights; what the bound multiplies
    |x' - x'~| and |x'~| with and what it adds; b_enc. Both in the order in which neighbours are STRIDE-th parts of
    n_latents apart, or, where STRIDE does not divide n_latents, in that of W_enc (and are not used)."""
    n_latents, d = W_enc.shape
    low = torch.empty_like(W_enc, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    norms, losses = [], []
    for W, rounded in zip(W_enc.detach().split(TILE), low.split(TILE), strict=True):
        rounded.copy_(W)
        norms.append(norm_rounded_up(W))
        losses.append(norm_rounded_up(W - rounded.float()))  # the difference is exact
    norm, lost, b = torch.cat(norms).double(), torch.cat(losses).double(), b_enc.detach().double()
    accumulation, denormal, root = MATRIX_UNITS * (d + 8) * 2.0**-24, 2.0**-126, d**0.5
    kept = norm + lost
    bounds = torch.stack(
        [
            norm,
            lost + accumulation * kept + denormal * root,
            accumulation * b.abs() + denormal * (root * kept + 2 * d + 1),
        ]
    )
    bounds = torch.cat([rounded_up(bounds), b_enc.detach()[None]])
    low = low.to(LOW)
    if n_latents % STRIDE:
        return low, bounds
    return (
        low.view(STRIDE, -1, d).transpose(0, 1).reshape(n_latents, d),
        bounds.view(4, STRIDE, -1).transpose(1, 2).reshape(4, n_latents),
    )


@dataclass(frozen=True)
class PrefilterSizes:
    """How a row's survivors are looked for."""

    group: int
    n_groups: int
    block_groups: int
    block_k: int
    most_groups: int  # alive in a row that is proved
    most_entries: int

    @classmethod
    def of(cls, n_latents: int, k: int) -> PrefilterSizes | None:
        """None where the plain path is the better one, or the only one."""
        block_k = next_power_of_2(max(k, 2))
        for group in GROUPS:
            n_groups = n_latents // group
            if n_latents % STRIDE or not GROUPS_A_K * k <= n_groups <= MOST_GROUPS:
                continue
            most = min(SURVIVORS * block_k, MAX_KEYS // group)
            if most >= 2 * block_k:
                block_groups = next_power_of_2(n_groups)
                return cls(group, n_groups, block_groups, block_k, most, min(SURVIVORS * block_k, MAX_KEYS))
        return None


@jit_over_rows
def _prefilter_rows_kernel(
    x_ptr,
    b_pre_ptr,
    centred_ptr,
    rounded_ptr,
    norms_ptr,
    d,
    stride_x_row,
    stride_x_d,
    stride_b_pre_d,
    above,
    least,
    BLOCK_D: tl.constexpr,
):
    """One row: x - b_pre, the same rounded to bf16, and norms [row] = (|kept|, |lost|), never less than the true ones."""
    row = tl.program_id(0).to(tl.int64)
    kept_squares, lost_squares = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D).to(tl.int64)  # transposed, the last lies d rows away
        x = tl.load(x_ptr + row * stride_x_row + column * stride_x_d, mask=column < d, other=0.0)
        x -= tl.load(b_pre_ptr + column * stride_b_pre_d, mask=column < d, other=0.0)
        # To nearest, ties to even, on the bits. A NaN may become anything here, but `lost` is NaN then.
        bits = x.to(tl.int32, bitcast=True)
        kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        lost = x - kept  # exact
        kept_squares += kept * kept
        lost_squares += lost * lost
        tl.store(centred_ptr + row * d + column, x, mask=column < d)
        tl.store(rounded_ptr + row * d + column, kept.to(rounded_ptr.dtype.element_ty), mask=column < d)
    tl.store(norms_ptr + 2 * row, tl.sqrt(tl.sum(kept_squares, axis=0)) * above + least)
    tl.store(norms_ptr + 2 * row + 1, tl.sqrt(tl.sum(lost_squares, axis=0)) * above + least)


@jit_over_rows
def _prefilter_groups_kernel(
    maxima_ptr,
    norms_ptr,
    group_bounds_ptr,
    largest_ptr,
    threshold_ptr,
    alive_ptr,
    n_alive_ptr,
    list_ptr,
    count_ptr,
    k,
    n_groups,
    LARGEST: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    HALVINGS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
):
    """One row: its threshold and the groups that are alive, in their order; or 0 of them and a place on the list."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    inside = group < n_groups
    bits = tl.load(maxima_ptr + row * n_groups + group, mask=inside, other=-0x80000000)  # [BLOCK_GROUPS]
    top = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    kept, lost = tl.load(norms_ptr + 2 * row), tl.load(norms_ptr + 2 * row + 1)
    margin = lost * tl.load(group_bounds_ptr + group, mask=inside, other=0.0)
    margin += kept * tl.load(group_bounds_ptr + n_groups + group, mask=inside, other=0.0)
    margin += tl.load(group_bounds_ptr + 2 * n_groups + group, mask=inside, other=0.0)
    lower = tl.where(inside, ordered(top - margin), -0x80000000)
    best = largest_keys(entry_key(lower, group, 0), BLOCK_K, LOG_K, HALVINGS)  # [BLOCK_K]
    threshold = (tl.min(tl.where(tl.arange(0, BLOCK_K) < k, best, 0x7FFFFFFFFFFFFFFF), axis=0) >> 32).to(tl.int32)
    alive = inside & (ordered(top + margin) >= threshold)
    count = tl.sum(alive.to(tl.int32), axis=0)
    # False for NaN too.
    provable = (kept + lost) * tl.load(largest_ptr) + tl.load(largest_ptr + 1) < LARGEST
    proved = tl.where(provable & (count <= MOST_GROUPS), count, 0)
    place = tl.cumsum(alive.to(tl.int32), axis=0) - 1
    tl.store(alive_ptr + row * MOST_GROUPS + place, group, mask=alive & (place < proved))
    tl.store(n_alive_ptr + row, proved)
    tl.store(threshold_ptr + row, threshold)
    if proved == 0:
        tl.store(list_ptr + tl.atomic_add(count_ptr, 1), row.to(tl.int32))


@jit_over_rows
def _prefilter_entries_kernel(
    scratch_ptr,
    norms_ptr,
    bounds_ptr,
    threshold_ptr,
    alive_ptr,
    n_alive_ptr,
    entries_ptr,
    n_entries_ptr,
    list_ptr,
    count_ptr,
    n_latents,
    SIGNED: tl.constexpr,
    STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    MOST_ENTRIES: tl.constexpr,
):
    """One row: the latents of its alive groups' entries that survive; or 0 of them and a place on the list."""
    row = tl.program_id(0).to(tl.int64)
    n_alive = tl.load(n_alive_ptr + row)
    count = n_alive * 0
    if n_alive > 0:
        slot = tl.arange(0, MOST_GROUPS)
        group = tl.load(alive_ptr + row * MOST_GROUPS + slot, mask=slot < n_alive, other=0)
        entry = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [MOST_GROUPS, GROUP]
        inside = (slot < n_alive)[:, None] & (entry < n_latents)
        p = tl.load(scratch_ptr + row * n_latents + entry, mask=inside, other=0.0)
        upper = tl.load(norms_ptr + 2 * row + 1) * tl.load(bounds_ptr + entry, mask=inside, other=0.0)
        upper += tl.load(norms_ptr + 2 * row) * tl.load(bounds_ptr + n_latents + entry, mask=inside, other=0.0)
        upper += tl.load(bounds_ptr + 2 * n_latents + entry, mask=inside, other=0.0)
        upper += tl.abs(p) if SIGNED else p
        survives = inside & (ordered(upper) >= tl.load(threshold_ptr + row))
        survives = tl.reshape(survives.to(tl.int32), [MOST_GROUPS * GROUP])
        latent = tl.reshape((entry % STRIDE) * (n_latents // STRIDE) + entry // STRIDE, [MOST_GROUPS * GROUP])
        count = tl.sum(survives, axis=0)
        place = tl.cumsum(survives, axis=0) - 1  # what is beyond MOST_ENTRIES is of a row that goes on the list
        tl.store(entries_ptr + row * MOST_ENTRIES + place, latent, mask=(survives == 1) & (place < MOST_ENTRIES))
        if count > MOST_ENTRIES:
            tl.store(list_ptr + tl.atomic_add(count_ptr, 1), row.to(tl.int32))
            count = n_alive * 0
    tl.store(n_entries_ptr + row, count)


@jit_over_rows
def _prefilter_rescore_kernel(
    centred_ptr,
    W_ptr,
    b_enc_ptr,
    entries_ptr,
    n_entries_ptr,
    a_ptr,
    d,
    stride_W_latent,
    stride_W_d,
    stride_b_enc_latent,
    MOST_ENTRIES: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_ENTRIES survivors of one row: their pre-activations in fp32. Every entry is summed in the same order, so
    equal weights have equal bits."""
    BLOCKS: tl.constexpr = MOST_ENTRIES // BLOCK_ENTRIES
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    slot = (tl.program_id(0) % BLOCKS) * BLOCK_ENTRIES + tl.arange(0, BLOCK_ENTRIES)
    count = tl.load(n_entries_ptr + row)
    if (tl.program_id(0) % BLOCKS) * BLOCK_ENTRIES < count:
        inside = slot < count
        latent = tl.load(entries_ptr + row * MOST_ENTRIES + slot, mask=inside, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_ENTRIES, BLOCK_D], tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D).to(tl.int64)  # transposed, columns lie up to d n_latents apart
            x = tl.load(centred_ptr + row * d + column, mask=column < d, other=0.0)  # [BLOCK_D]
            w_ptrs = W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d
            w = tl.load(w_ptrs, mask=inside[:, None] & (column < d)[None, :], other=0.0)  # [BLOCK_ENTRIES, BLOCK_D]
            total += w * x[None, :]
        b = tl.load(b_enc_ptr + latent * stride_b_enc_latent, mask=inside, other=0.0)
        tl.store(a_ptr + row * MOST_ENTRIES + slot, tl.sum(total, axis=1) + b, mask=inside)


@jit_over_rows
def _prefilter_finish_kernel(
    a_ptr,
    entries_ptr,
    n_entries_ptr,
    values_ptr,
    indices_ptr,
    k,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    MOST_ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """The code of one row that has a proof: the k largest of its survivors."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(n_entries_ptr + row)
    if count > 0:
        slot = tl.arange(0, MOST_ENTRIES)
        a = tl.load(a_ptr + row * MOST_ENTRIES + slot, mask=slot < count, other=0.0)  # [MOST_ENTRIES]
        latent = tl.load(entries_ptr + row * MOST_ENTRIES + slot, mask=slot < count, other=0)
        score = tl.where(slot < count, ordered(tl.abs(a) if SIGNED else a), -0x80000000)
        top = largest_keys(entry_key(score, latent, (a < 0.0).to(tl.int32)), BLOCK_K, LOG_K, HALVINGS)
        store_code(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)


def warps(entries: int) -> int:
    """Of a program that holds so many entries."""
    return min(16, max(4, entries // 512))


def topk_prefiltered_triton(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    low: Tensor,
    bounds: Tensor,
    k: int,
    selection: str,
    sizes: PrefilterSizes,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of checked fp32 arguments with `gpu_weights`. `blocks`: the bf16 product's, of a tuning table.

    `SelectSizes.of(n_latents, k, ...)` must fit. Scratch: TRITON_SCRATCH_BYTES.
    """
    rows, d = x.shape
    n_latents, relu, signed = W_enc.shape[0], selection == "relu", selection == "signed"
    values = x.new_empty(rows, k, dtype=torch.float32)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    if rows == 0:
        return values, indices
    blocks = default_product(torch.bfloat16) if blocks is None else blocks
    plain_blocks = default_product(torch.float32)
    plain = SelectSizes.of(n_latents, k, plain_blocks["BLOCK_LATENTS"])
    most_maxima = max(sizes.n_groups, plain.n_groups)
    width = max(n_latents, plain.n_groups * plain.group)
    bytes_a_row = 4 * (width + most_maxima + sizes.most_groups + 2 * sizes.most_entries + 6) + 6 * d
    chunks = row_chunks(rows, bytes_a_row, TRITON_SCRATCH_BYTES, blocks["BLOCK_ROWS"])
    chunk = chunks[0].stop
    scratch = x.new_empty(chunk, width)
    products = scratch.view(-1)[: chunk * n_latents].view(chunk, n_latents)
    maxima = x.new_empty(chunk, most_maxima, dtype=torch.int32)
    centred, rounded, norms = x.new_empty(chunk, d), x.new_empty(chunk, d, dtype=low.dtype), x.new_empty(chunk, 2)
    alive = x.new_empty(chunk, sizes.most_groups, dtype=torch.int32)
    entries = x.new_empty(chunk, sizes.most_entries, dtype=torch.int32)
    a = x.new_empty(chunk, sizes.most_entries)
    threshold, n_alive, n_entries, unproved = (x.new_empty(chunk, dtype=torch.int32) for _ in range(4))
    counts = x.new_zeros(len(chunks), 4, dtype=torch.int32)  # one used: every chunk's is aligned to 16 bytes
    group_bounds = bounds[:3].reshape(3, sizes.n_groups, sizes.group).amax(2)
    # Weights that are infinite in bf16 have a norm that is infinite in fp32: no row is provable then.
    largest = torch.stack([bounds[0].amax(), bounds[3].abs().amax()])
    # As of norm_rounded_up; twice its last term, for a root that takes denormals for 0.
    above, least = 1 + (d + 8) * 2.0**-24 + 1e-6, 2.0**-62 * d**0.5
    most = {"MOST_GROUPS": sizes.most_groups, "MOST_ENTRIES": sizes.most_entries}
    log_k, block_k = sizes.block_k.bit_length() - 1, sizes.block_k
    entry_block = min(16, sizes.most_entries)
    block_d = min(256, next_power_of_2(max(d, 16)))
    with torch.cuda.device_of(x):
        for count, out in zip(counts, chunks, strict=True):
            part, out_values, out_indices = x[out], values[out], indices[out]
            here = part.shape[0]
            _prefilter_rows_kernel[(here,)](
                part, b_pre, centred, rounded, norms, d, *part.stride(), *b_pre.stride(), above, least,
                BLOCK_D=min(1024, next_power_of_2(max(d, 16))), num_warps=4,
            )  # fmt: skip
            launch_product(
                rounded[:here], low, bounds[3], products, maxima, sizes.n_groups, sizes.group, signed, blocks
            )
            _prefilter_groups_kernel[(here,)](
                maxima, norms, group_bounds, largest, threshold, alive, n_alive, unproved, count, k, sizes.n_groups,
                LARGEST=LARGEST, BLOCK_GROUPS=sizes.block_groups, BLOCK_K=block_k, LOG_K=log_k,
                HALVINGS=(sizes.block_groups // block_k).bit_length() - 1, MOST_GROUPS=sizes.most_groups,
                num_warps=warps(2 * sizes.block_groups),  # two values a group
            )  # fmt: skip
            _prefilter_entries_kernel[(here,)](
                products, norms, bounds, threshold, alive, n_alive, entries, n_entries, unproved, count, n_latents,
                SIGNED=signed, STRIDE=STRIDE, GROUP=sizes.group, **most,
                num_warps=warps(sizes.most_groups * sizes.group),
            )  # fmt: skip
            _prefilter_rescore_kernel[(here * (sizes.most_entries // entry_block),)](
                centred, W_enc, b_enc, entries, n_entries, a, d, *W_enc.stride(), *b_enc.stride(),
                MOST_ENTRIES=sizes.most_entries, BLOCK_ENTRIES=entry_block, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
            _prefilter_finish_kernel[(here,)](
                a, entries, n_entries, out_values, out_indices, k, RELU=relu, SIGNED=signed,
                MOST_ENTRIES=sizes.most_entries, BLOCK_K=block_k, LOG_K=log_k,
                HALVINGS=(sizes.most_entries // block_k).bit_length() - 1, num_warps=warps(sizes.most_entries),
            )  # fmt: skip
            listed = unproved, count
            launch_product(
                centred[:here], W_enc, b_enc, scratch, maxima, plain.n_groups, plain.group, signed, plain_blocks, listed
            )
            launch_select(scratch, maxima, out_values, out_indices, n_latents, selection, plain, listed)
    return values, indices
