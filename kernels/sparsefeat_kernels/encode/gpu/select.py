"""The selection of topk_encode: a row's k largest from what its groups kept, and the proof that nothing larger was left out.

One warp takes a row. It bisects the bits of maxima of a few groups' best keys for a bound that at least k of them reach,
collects the entries that reach it, the best and the second of their groups, and finds the k largest of these by their full
values. The proof: no third key of these groups reaches the k-th, the four bits left out. A group whose third does may have
left out one of the k largest, and is a suspect.

A row with suspects goes on a list, by an atomic counter on an integer. After all rows a launch of fixed size, whose programs
share the list, computes all latents of the suspects plainly, from x and W in fp32 with fused multiply-adds, and takes the k
largest of these and of what the other groups kept. All groups are suspects in a row with NaN or infinity, and where more
reach the bound than there is room for, which needs ties by the dozen. The host waits for nothing. Rows do not depend on each
other, so their order on the list, which differs from run to run, shows nowhere.

Where latents go in chunks, a row's k largest so far are its state, and a chunk's entries must reach the k-th of them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...dispatch import jit, jit_over_rows, next_power_of_2, tl
from ..keys import entry_key, index_of, largest_keys, ordered, relu_keys, store_broken, store_code
from .groups import GROUP, floor_of, group_of, larger, latent_of

__all__ = [
    "LARGEST_K",
    "MOST_GROUPS",
    "SelectSizes",
    "Selected",
    "entries_of",
    "launch_repair",
    "launch_select",
    "sizes_of",
]

LARGEST_K = 128
COUNTED = 256  # maxima that are bisected
MOST_GROUPS = 8192  # of one program of the selection
REPAIRING = 264  # programs that share the rows of the list: two on each of the 132 multiprocessors of an H100
REPAIRED_BYTES = 8 << 10  # of weights at a time: a thread does with 128 registers, and two programs fit
MOST_SUSPECTS = 16  # that a row writes down


@dataclass(frozen=True)
class SelectSizes:
    """Sizes of a row's selection, which depend on k and on the groups of a chunk."""

    n_groups: int
    k: int

    @functools.cached_property
    def block_k(self) -> int:
        return next_power_of_2(max(self.k, 2))

    @functools.cached_property
    def blocks(self) -> dict[str, int]:
        block_groups = next_power_of_2(max(self.n_groups, 2))
        return {
            "BLOCK_GROUPS": block_groups,
            "COUNTED": min(COUNTED, block_groups),
            "BLOCK_ENTRIES": entries_of(self.k),
            "BLOCK_K": self.block_k,
            "LOG_K": self.block_k.bit_length() - 1,
            "HALVINGS": (entries_of(self.k) // self.block_k).bit_length() - 1,
            "MOST_SUSPECTS": MOST_SUSPECTS,
            "num_warps": max(1, min(4, block_groups // 2048)),
        }


@functools.cache
def sizes_of(n_groups: int, k: int) -> SelectSizes:
    """One object for every pair, which works its blocks out once: a call's host time is made of such things."""
    return SelectSizes(n_groups, k)


@functools.cache
def repair_blocks(k: int, itemsize: int) -> dict[str, int]:
    """Of as many latents at a time as a list of keys has, and REPAIRED_BYTES of their weights."""
    block_k = next_power_of_2(max(k, 2))
    repaired = max(1, block_k // GROUP)
    return {
        "REPAIRED": repaired,
        "BLOCK_K": block_k,
        "LOG_K": block_k.bit_length() - 1,
        "HALVINGS": (repaired * GROUP // block_k).bit_length() - 1,
        "BLOCK_D": REPAIRED_BYTES // (repaired * GROUP * itemsize),
        "num_warps": 8,  # of k = 32 the compiler makes 1,560 instructions for 2,480 of 4, which spill on sm_100
    }


def entries_of(k: int) -> int:
    """That may reach the bound: k and as many again."""
    return 2 * next_power_of_2(max(k, 2))


@jit
def _kth_bound(floors, k):
    """A number that the k largest of int32 [N <= 1023], without their last four bits, reach, and few others: two bits at a
    time, three counts a sum, until no more than a quarter too many do or no bit is left."""
    bound, step = tl.full([], -0x80000000, tl.int32), tl.full([], 1 << 30, tl.int32)
    count = tl.full([], 1023, tl.int32)
    while (step >= 16) & (4 * count > 5 * k):
        one = bound + step
        two = one + step  # 2 step may be no int32
        three = two + step
        reach = (floors >= one).to(tl.int32) + ((floors >= two).to(tl.int32) << 10)
        reach = tl.sum(reach + ((floors >= three).to(tl.int32) << 20), axis=0)
        of_one, of_two, of_three = reach & 1023, (reach >> 10) & 1023, reach >> 20
        bound = tl.where(of_three >= k, three, tl.where(of_two >= k, two, tl.where(of_one >= k, one, bound)))
        count = tl.where(of_three >= k, of_three, tl.where(of_two >= k, of_two, tl.where(of_one >= k, of_one, count)))
        step = step >> 2
    return bound


@jit
def _collect(ids, wanted, out_ptr, before, MOST: tl.constexpr):
    """Of a vector of ids those that are wanted, after the `before` first of out, up to MOST. How many are there now."""
    count = wanted.to(tl.int32)
    place = before + tl.cumsum(count, axis=0) - 1
    tl.store(out_ptr + place, ids, mask=wanted & (place < MOST))
    tl.debug_barrier()  # other lanes read what these wrote
    return before + tl.sum(count, axis=0)


@jit
def _entries(
    kept_ptr, plane, group, inside, n_groups, n_latents, first_latent, STRETCHES: tl.constexpr, SIGNED: tl.constexpr
):
    """The `entry_key`s of kept entries, with their full values. What is no candidate sorts below all that is."""
    bits = tl.load(kept_ptr + plane * n_groups + group, mask=inside, other=0)
    place = bits & 15
    cut = tl.load(kept_ptr + (3 + place // 8) * n_groups + group, mask=inside, other=0)
    value = ((bits & -16) | (cut >> ((place % 8) * 4) & 15)).to(tl.float32, bitcast=True)
    negative = tl.full(bits.shape, 0, tl.int32)
    if SIGNED:
        negative = tl.load(kept_ptr + 5 * n_groups + group, mask=inside, other=0) >> place & 1
    latent = latent_of(group, place, STRETCHES)
    score = tl.where(inside & (latent < n_latents) & (value > -1e38), ordered(value), -0x80000000)
    return entry_key(score, first_latent + latent, negative)


@jit
def _of_both(a, b, BLOCK_K: tl.constexpr, LOG_K: tl.constexpr):
    """The BLOCK_K largest of two such lists of keys, descending."""
    return largest_keys(tl.reshape(tl.join(a, b), [2 * BLOCK_K]), BLOCK_K, LOG_K, 1)


@jit
def _finish(top, values_ptr, indices_ptr, row, k, RELU: tl.constexpr, SIGNED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The code of a row from the keys of its k largest."""
    if (tl.max(top, axis=0) >> 32) == 0x7FFFFFFF:
        store_broken(values_ptr, indices_ptr, row, k, BLOCK_K)
    else:
        if RELU:
            top = relu_keys(top, k, BLOCK_K)
        store_code(top, values_ptr, indices_ptr, row, k, SIGNED, BLOCK_K)


@jit_over_rows
def _topk_encode_select_kernel(
    kept_ptr,
    ids_ptr,
    state_ptr,
    list_ptr,
    values_ptr,
    indices_ptr,
    k,
    n_latents,
    n_groups,
    first_row,
    first_latent,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHES: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK_ENTRIES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    HALVINGS: tl.constexpr,
    MOST_SUSPECTS: tl.constexpr,
):
    """One row: its code or state where it is proved. Else its number on the list, its state without the suspects, and
    these, or -1 of them for all groups."""
    NONE: tl.constexpr = -0x8000000000000000  # below the key of any entry
    SHARED: tl.constexpr = BLOCK_GROUPS // COUNTED  # groups of one maximum
    BLOCK_MAXIMA: tl.constexpr = BLOCK_ENTRIES if BLOCK_ENTRIES < COUNTED else COUNTED
    row = tl.program_id(0).to(tl.int64)
    kept_ptr += row * ((6 if SIGNED else 5) * n_groups)
    ids_ptr += row * (2 * BLOCK_ENTRIES)
    row += first_row
    group = tl.arange(0, BLOCK_GROUPS)
    best = tl.load(kept_ptr + group, mask=group < n_groups, other=-1 << 23).to(tl.float32, bitcast=True)  # -inf
    best = tl.reduce(tl.reshape(best, [SHARED, COUNTED]), 0, larger)
    best = floor_of(best.to(tl.int32, bitcast=True))  # [COUNTED]
    bound = _kth_bound(best, k)
    if not FIRST:
        before = tl.load(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K))
        bound = tl.maximum(bound, (tl.load(state_ptr + row * BLOCK_K + k - 1) >> 32).to(tl.int32) & -16)
    # As a value: the least of the bound's sixteen. What is infinite is no candidate.
    bound = tl.maximum(bound, -0x7F800000)
    least = (bound ^ ((bound >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    n_found = _collect(tl.arange(0, COUNTED), best >= bound, ids_ptr, 0, BLOCK_MAXIMA)
    slot = tl.arange(0, BLOCK_MAXIMA)
    found = tl.load(ids_ptr + slot, mask=slot < n_found, other=0)
    group = found[:, None] + tl.arange(0, SHARED)[None, :] * COUNTED
    group = tl.reshape(group, [BLOCK_MAXIMA * SHARED])
    real = tl.reshape(tl.broadcast_to((slot < n_found)[:, None], [BLOCK_MAXIMA, SHARED]), [BLOCK_MAXIMA * SHARED])
    real &= group < n_groups
    reaches = (tl.load(kept_ptr + group, mask=real, other=0).to(tl.float32, bitcast=True) >= least) & real
    ids_ptr += BLOCK_ENTRIES
    n_alive = _collect(group, reaches, ids_ptr, 0, BLOCK_ENTRIES)
    slot = tl.arange(0, BLOCK_ENTRIES)
    alive = slot < n_alive
    group = tl.load(ids_ptr + slot, mask=alive, other=0)  # [BLOCK_ENTRIES]
    second = tl.load(kept_ptr + n_groups + group, mask=alive, other=0).to(tl.float32, bitcast=True)
    third = floor_of(tl.load(kept_ptr + 2 * n_groups + group, mask=alive, other=0))
    third = tl.where(alive, third, -0x80000000)
    n_entries = _collect(group, alive & (second >= least), ids_ptr, n_alive, BLOCK_ENTRIES)
    entry = tl.load(ids_ptr + slot, mask=slot < n_entries, other=0)
    plane = (slot >= n_alive).to(tl.int32)
    keys = _entries(kept_ptr, plane, entry, slot < n_entries, n_groups, n_latents, first_latent, STRETCHES, SIGNED)
    top = largest_keys(keys, BLOCK_K, LOG_K, HALVINGS)
    if not FIRST:
        top = _of_both(top, before, BLOCK_K, LOG_K)
    last = tl.min(tl.where(tl.arange(0, BLOCK_K) < k, top, 0x7FFFFFFFFFFFFFFF), axis=0)  # the k-th
    last = (last >> 32).to(tl.int32) & -16
    suspect = alive & (third >= last)
    n_suspects = tl.sum(suspect.to(tl.int32), axis=0)
    plainly = (n_found > BLOCK_MAXIMA) | (n_entries > BLOCK_ENTRIES) | (n_suspects > MOST_SUSPECTS)
    # The largest finite value stands for -inf where it is negative; fewer than k are candidates.
    plainly |= (tl.max(best, axis=0) >= 0x7F7FFFF0) | (last == -0x80000000)
    if plainly | (n_suspects > 0):
        list_ptr += 1 + tl.atomic_add(list_ptr, 1) * (2 + MOST_SUSPECTS)
        tl.store(list_ptr, row.to(tl.int32))
        tl.store(list_ptr + 1, tl.where(plainly, -1, n_suspects))
        out = list_ptr + 1 + tl.cumsum(suspect.to(tl.int32), axis=0)
        tl.store(out, group, mask=suspect & (not plainly))
        # Of its k largest, those of suspects are left to the repair.
        latent = (index_of(top) - first_latent).to(tl.int32)
        here = (latent >= 0) & ((top >> 32).to(tl.int32) > -0x80000000)
        beside = tl.load(kept_ptr + 2 * n_groups + group_of(latent, STRETCHES), mask=here, other=0)
        rest = tl.where(here & (floor_of(beside) >= last), NONE, top)
        if FIRST:
            rest = tl.where(plainly, NONE, rest)
        else:
            rest = tl.where(plainly, before, rest)
        tl.store(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K), rest)
    elif LAST:
        _finish(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)
    else:
        tl.store(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K), top)


@jit_over_rows
def _topk_encode_repair_kernel(
    x_ptr,
    W_ptr,
    b_pre_ptr,
    bias_ptr,
    state_ptr,
    list_ptr,
    values_ptr,
    indices_ptr,
    k,
    n_latents,
    d,
    n_groups,
    first_latent,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_b_pre_d,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    CENTRED: tl.constexpr,
    LAST: tl.constexpr,
    STRETCHES: tl.constexpr,
    MOST_SUSPECTS: tl.constexpr,
    REPAIRED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    HALVINGS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The code or state of the rows of the list: of their state and of all latents of their suspects."""
    for i in range(tl.program_id(0), tl.load(list_ptr), tl.num_programs(0)):
        entry_ptr = list_ptr + 1 + i * (2 + MOST_SUSPECTS)
        row = tl.load(entry_ptr).to(tl.int64)
        n_suspects = tl.load(entry_ptr + 1)
        plainly = n_suspects < 0
        n_suspects = tl.where(plainly, n_groups, n_suspects)
        top = tl.load(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K))
        for start in range(0, n_suspects, REPAIRED):
            entry = tl.arange(0, REPAIRED * 16)
            slot = start + entry // 16
            named = (slot < n_suspects) & (not plainly)
            group = tl.load(entry_ptr + 2 + slot, mask=named, other=0)
            latent = latent_of(tl.where(plainly, slot, group), entry % 16, STRETCHES).to(tl.int64)
            inside = (slot < n_suspects) & (latent < n_latents)
            total = tl.zeros([REPAIRED * 16, BLOCK_D], tl.float32)
            for begin in range(0, d, BLOCK_D):
                column = begin + tl.arange(0, BLOCK_D).to(tl.int64)  # columns may be 2^31 elements apart
                x = tl.load(x_ptr + row * stride_x_row + column * stride_x_d, mask=column < d, other=0.0)
                if CENTRED:
                    x -= tl.load(b_pre_ptr + column * stride_b_pre_d, mask=column < d, other=0.0)
                W_ptrs = W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d
                w = tl.load(W_ptrs, mask=inside[:, None] & (column < d)[None, :], other=0.0)
                total += w.to(tl.float32) * x.to(tl.float32)[None, :]  # [REPAIRED * 16, BLOCK_D]
            bias = tl.load(bias_ptr + latent, mask=inside, other=0.0)
            if not CENTRED:  # made without infinities
                bias = tl.where(bias == -3.4028234663852886e38, float("-inf"), bias)
            a = tl.sum(total, axis=1) + bias
            score = tl.where(inside, ordered(tl.abs(a) if SIGNED else a), -0x80000000)
            keys = entry_key(score, first_latent + latent.to(tl.int32), (a < 0.0).to(tl.int32))
            if HALVINGS > 0:
                keys = largest_keys(keys, BLOCK_K, LOG_K, HALVINGS)
            top = _of_both(top, keys, BLOCK_K, LOG_K)
        tl.store(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K), top)
    if LAST:  # in a loop of its own: what that keeps in registers would be in the way of the one above
        tl.debug_barrier()  # other warps read what these wrote
        for i in range(tl.program_id(0), tl.load(list_ptr), tl.num_programs(0)):
            row = tl.load(list_ptr + 1 + i * (2 + MOST_SUSPECTS)).to(tl.int64)
            top = tl.load(state_ptr + row * BLOCK_K + tl.arange(0, BLOCK_K))
            _finish(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)


@dataclass(frozen=True)
class Selected:
    """What the launches of a chunk of latents share: results, and what is written down of all rows."""

    code: tuple[Tensor, Tensor]  # values, indices [rows, k]
    state: Tensor  # int64 [rows, BLOCK_K]: the keys of the k largest so far
    listed: (
        Tensor  # int32: how many are on the list, then of each its row, the number of its suspects, and their groups
    )

    @classmethod
    def of(cls, code: tuple[Tensor, Tensor], block_k: int) -> Selected:
        values, indices = code
        rows = values.shape[0]
        state = values.new_empty(rows, block_k, dtype=torch.int64)
        return cls(code, state, indices.new_empty(1 + rows * (2 + MOST_SUSPECTS)))

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return self.state, self.listed, *self.code


def launch_select(
    kept: Tensor, ids: Tensor, to: Selected, rows: slice, n_latents: int, first_latent: int, sizes: SelectSizes,
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """Codes or states of some rows, whose chunk of latents begins at `first_latent`, and the list of those without a
    proof."""
    _topk_encode_select_kernel[(rows.stop - rows.start,)](
        kept, ids, *to.arguments, sizes.k, n_latents, sizes.n_groups, rows.start, first_latent,
        FIRST=first_latent == 0, **constants, **sizes.blocks,
    )  # fmt: skip


def launch_repair(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], to: Selected, first_latent: int, sizes: SelectSizes,
    constants: Mapping[str, Any],
) -> None:  # fmt: skip
    """Codes or states of the rows of the list. inputs: x, W, b_pre and the bias."""
    x, W, b_pre, bias = inputs
    _topk_encode_repair_kernel[(min(REPAIRING, x.shape[0]),)](
        x, W, b_pre, bias, *to.arguments, sizes.k, *W.shape, sizes.n_groups, first_latent, *x.stride(), *W.stride(),
        b_pre.stride(0), CENTRED=x.dtype == torch.float32, MOST_SUSPECTS=MOST_SUSPECTS, **constants,
        **repair_blocks(sizes.k, W.itemsize),
    )  # fmt: skip
