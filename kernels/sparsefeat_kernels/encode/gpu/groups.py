"""The product of topk_encode: of every group of 16 latents the three best, and the bits that their keys leave out.

A group is what one thread of the matrix units' layout holds of a stretch of 64 latents: two neighbours of each octet. The
key of an entry is its fp32 value with the last four bits replaced by its place in the group, so that the three best of 16
are a network of maxima and minima. The bits cut off are kept beside the keys, four of every entry. The planes of a row are

    0, 1, 2     the three best keys of every group, as floats
    3, 4        the last four bits of the entries 0 to 7 and 8 to 15, four bits each
    5           (signed selection, where keys are of magnitudes) the signs of the 16 entries, a bit each

together 20 or 24 bytes for 16 latents. NaN passes through every maximum. A key whose value is infinite may be NaN as well,
which sends its row to be computed plainly; no row is lost by that.
"""

from __future__ import annotations

from torch import Tensor

from ...dispatch import jit, jit_over_rows, tl
from .tiles import Operands, tile_sums

__all__ = [
    "GROUP",
    "PLANES",
    "floor_of",
    "group_of",
    "kept_bytes",
    "larger",
    "latent_of",
    "launch_product",
    "n_groups_of",
]

GROUP = 16
PLANES = 5  # and one where the selection is signed


def n_groups_of(n_latents: int, block_latents: int) -> int:
    """Groups of a row, those of the last tile's padding among them."""
    return -(-n_latents // block_latents) * (block_latents // GROUP)


def kept_bytes(signed: bool) -> float:
    """Of a pre-activation."""
    return 4 * (PLANES + signed) / GROUP


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def latent_of(group, place, STRETCHES: tl.constexpr):
    """The latent at a place of a group. Tiles have 4 STRETCHES groups, by pair of columns, then by stretch."""
    within = group % (4 * STRETCHES)
    pair, stretch = within // STRETCHES, group // (4 * STRETCHES) * STRETCHES + within % STRETCHES
    return stretch * 64 + (place // 2) * 8 + pair * 2 + place % 2


@jit
def group_of(latent, STRETCHES: tl.constexpr):
    """The group that a latent is of."""
    stretch, pair = latent // 64, latent % 8 // 2
    return stretch // STRETCHES * (4 * STRETCHES) + pair * STRETCHES + stretch % STRETCHES


@jit
def floor_of(bits):
    """int32 ordered as the values of keys are, without the last four bits. NaN of either sign is the largest."""
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) & -16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFFFFF0, ordered)


@jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def _halves(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    """Even and odd places of [ROWS, GROUPS, N]."""
    return tl.split(tl.reshape(x, [ROWS, GROUPS, N // 2, 2]))


@jit
def _merged(first, second, third, ROWS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr):
    """The three best of neighbours, from descending triples [ROWS, GROUPS, N] of each."""
    a1, b1 = _halves(first, ROWS, GROUPS, N)
    a2, b2 = _halves(second, ROWS, GROUPS, N)
    a3, b3 = _halves(third, ROWS, GROUPS, N)
    lower, upper = smaller(a1, b1), larger(a2, b2)
    return larger(a1, b1), larger(lower, upper), larger(smaller(lower, upper), larger(a3, b3))


@jit
def _in_groups(x, ROWS: tl.constexpr, STRETCHES: tl.constexpr):
    """[ROWS, 64 STRETCHES] as [ROWS, groups, 16]: a thread's own columns side by side, its groups too."""
    x = tl.permute(tl.reshape(x, [ROWS, STRETCHES, 8, 4, 2]), (0, 3, 1, 2, 4))
    return tl.reshape(x, [ROWS, 4 * STRETCHES, 16])


@jit
def _digits(x, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Of int32 [ROWS, GROUPS, 16], the sums of 16^i x_i over the first eight and the last, modulo 2^32."""
    even, odd = _halves(x, ROWS, GROUPS, 16)
    even, odd = _halves(even + odd * 16, ROWS, GROUPS, 8)
    even, odd = _halves(even + odd * 256, ROWS, GROUPS, 4)
    return tl.split(even + odd * 65536)


@jit_over_rows
def _topk_encode_product_kernel(
    x,
    W,
    b_pre_ptr,
    bias_ptr,
    kept_ptr,
    count_ptr,
    rows,
    n_latents,
    d,
    n_groups,
    first_row,
    first_latent,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_b_pre_d,
    SIGNED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    CENTRED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """kept [rows, planes, n_groups] of x W^T + bias, of rows and latents from the first ones on. The first rows' puts 0 into
    count: none is without a proof yet."""
    STRETCHES: tl.constexpr = BLOCK_LATENTS // 64
    GROUPS: tl.constexpr = 4 * STRETCHES
    N_PLANES: tl.constexpr = 6 if SIGNED else 5
    if (tl.program_id(0) == 0) & (first_row == 0):
        tl.store(count_ptr, 0)
    bias_ptr += first_latent  # here: added to every latent it would be an operation of each
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
        latent = block * BLOCK_LATENTS + column
        bias = tl.load(bias_ptr + latent, mask=latent < n_latents, other=0.0 if SIGNED else -3.4028234663852886e38)
        if CENTRED and not SIGNED:  # the bias is the encoder's own; the other is made without infinities
            bias = larger(bias, -3.4028234663852886e38)
        bits = (total + bias[None, :]).to(tl.int32, bitcast=True)  # [BLOCK_ROWS, BLOCK_LATENTS]
        # Of no constant, or a key would take two instructions, one for each immediate operand.
        place = ((column // 8) % 8) * 2 + column % 2 + tl.minimum(n_groups, 0)
        out_row = row + tl.arange(0, BLOCK_ROWS)
        inside = (out_row < rows)[:, None]
        out = out_row[:, None].to(tl.int64) * (N_PLANES * n_groups) + block * GROUPS + tl.arange(0, GROUPS)[None, :]
        out = kept_ptr + out
        if SIGNED:  # first, while nothing else takes registers
            negative = _in_groups((bits >> 31 & 1) << place[None, :], BLOCK_ROWS, STRETCHES)
            tl.store(out + 5 * n_groups, tl.xor_sum(negative, axis=2), mask=inside)
            bits &= 0x7FFFFFFF
        key = _in_groups((bits & -16) | place[None, :], BLOCK_ROWS, STRETCHES)
        even, odd = _halves(key.to(tl.float32, bitcast=True), BLOCK_ROWS, GROUPS, 16)
        high, low = larger(even, odd), smaller(even, odd)  # [BLOCK_ROWS, GROUPS, 8]
        high_a, high_b = _halves(high, BLOCK_ROWS, GROUPS, 8)
        low_a, low_b = _halves(low, BLOCK_ROWS, GROUPS, 8)
        first, lower, upper = larger(high_a, high_b), smaller(high_a, high_b), larger(low_a, low_b)
        second, third = larger(lower, upper), smaller(lower, upper)
        first, second, third = _merged(first, second, third, BLOCK_ROWS, GROUPS, 4)
        first, second, third = _merged(first, second, third, BLOCK_ROWS, GROUPS, 2)
        # What is cut off is the difference of the bits and the keys, but for the places, 0x76543210 and 0xFEDCBA98. Sums
        # of products take the units that the maxima leave idle, masks would not.
        bits_a, bits_b = _digits(_in_groups(bits, BLOCK_ROWS, STRETCHES), BLOCK_ROWS, GROUPS)
        keys_a, keys_b = _digits(key, BLOCK_ROWS, GROUPS)
        cut_a, cut_b = bits_a - keys_a + 0x76543210, bits_b - keys_b - 0x01234568
        tl.store(out, tl.reshape(first, [BLOCK_ROWS, GROUPS]).to(tl.int32, bitcast=True), mask=inside)
        tl.store(out + n_groups, tl.reshape(second, [BLOCK_ROWS, GROUPS]).to(tl.int32, bitcast=True), mask=inside)
        tl.store(out + 2 * n_groups, tl.reshape(third, [BLOCK_ROWS, GROUPS]).to(tl.int32, bitcast=True), mask=inside)
        tl.store(out + 3 * n_groups, cut_a, mask=inside)
        tl.store(out + 4 * n_groups, cut_b, mask=inside)


def launch_product(
    of: Operands,
    b_pre: Tensor,
    bias: Tensor,
    kept: Tensor,
    count: Tensor,
    rows: slice,
    latents: slice,
    signed: bool,
) -> None:
    """kept and count, of some rows and latents."""
    n_rows, n_latents = rows.stop - rows.start, latents.stop - latents.start
    _topk_encode_product_kernel[(of.programs(n_rows, n_latents),)](
        of.x, of.W, b_pre, bias, kept, count, n_rows, n_latents, of.d, n_groups_of(n_latents, of.tile["BLOCK_LATENTS"]),
        rows.start, latents.start, *of.strides, b_pre.stride(0), SIGNED=signed, **of.constants,
    )  # fmt: skip
