"""Design B of topk_encode on a GPU: pre-activations never leave the registers, only the candidates among them do.

The contract is that of `topk_encode`, whose design A writes a chunk's pre-activations to a scratch and reads them again.
Here the product's epilogue keeps of every group of latents the KEPT best (ordered value and place in the group) and the
value of the next one, which was left out. Then, one row a program:

    1. the k groups with the largest best entries: an entry of any other group is beaten by those k;
    2. the k largest of what these groups kept;
    3. the certificate: no value that was left out of these groups reaches the k-th of 2. (A group that kept all it has
       left out nothing.) With it the row is finished.

A row without one goes on a list, by an atomic counter on an integer. Two more launches of fixed size read the counter:
all entries of those of the row's groups that left out too much are computed again, by the same tile product and so in
the same bits; the k largest of them and of what the other groups kept are the row's. The host waits for nothing. Rows do
not depend on each other, so their order on the list, which differs from run to run, shows nowhere.

Latent i is in group i mod n_groups: neighbours never share a group, and the latents that fire most in an ordered
(Matryoshka) dictionary, its first ones, are spread over all of them. With latents spread by chance a row fails when some
group holds KEPT + 1 of its k largest, of which C(k, KEPT + 1) / n_groups^KEPT bounds the probability; `kept_for` takes
the least KEPT that makes it a hundredth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch import jit, jit_over_rows, next_power_of_2, row_chunks, tl
from ..keys import entry_key, index_of, largest_keys, ordered, store_broken, store_code
from ..product import TRITON_SCRATCH_BYTES, default_product, encoder_bias, tile_product
from .scratch import MAX_KEYS

__all__ = ["CandidateBlocks", "candidate_blocks", "default_blocks", "kept_for", "topk_candidates_triton"]

# Of rows. Each costs a tile of its own beside its share of the product: 1.25 tiles of 128 x 128 at 20,480 latents. So
# latents that always fire together in one group cost less than the product once more.
UNPROVED_SHARE = 0.01
LARGEST_KEPT = 4  # a round of the epilogue is six operations an entry: beyond four, design A's stores are cheaper
PERSISTENT = 264  # programs that share the rows of the list: two on each of the 132 multiprocessors of an H100


@dataclass(frozen=True)
class CandidateBlocks:
    """Sizes of one configuration. The epilogue reduces along the accumulator's registers when the groups of a tile
    (BLOCK_LATENTS / GROUP) are eight, the columns that the threads of a quad hold two of each."""

    BLOCK_ROWS: int
    BLOCK_LATENTS: int
    BLOCK_D: int
    GROUP: int  # 2 to 64: a place and a sign fit a byte
    KEPT: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("BLOCK_ROWS", "BLOCK_LATENTS", "BLOCK_D", "GROUP", "num_warps"):
            if (size := getattr(self, name)) != next_power_of_2(size):
                raise ValueError(f"{name} must be a power of two, got {size}")
        if not 2 <= self.GROUP <= min(64, self.BLOCK_LATENTS):
            raise ValueError(f"GROUP must be from 2 to 64 and at most BLOCK_LATENTS, got {self.GROUP}")
        if not 1 <= self.KEPT < self.GROUP:
            raise ValueError(f"KEPT must be at least 1 and below GROUP = {self.GROUP}, got {self.KEPT}")

    def n_groups(self, n_latents: int) -> int:
        """Groups of a row, those of the last tile's padding among them."""
        return -(-n_latents // self.BLOCK_LATENTS) * (self.BLOCK_LATENTS // self.GROUP)

    def fits(self, n_latents: int, k: int) -> bool:
        """Whether the selection of k is possible: enough groups, and all keys of a row in one program's registers."""
        groups = self.n_groups(n_latents)
        keys = max(next_power_of_2(groups), next_power_of_2(k) * self.GROUP)
        return k <= groups and keys <= MAX_KEYS


def kept_for(n_groups: int, k: int) -> int | None:
    """The least number of kept entries a group with which at most UNPROVED_SHARE of rows are expected to go on the
    list, or None where LARGEST_KEPT are too few: then design A is the better one."""
    kept = range(1, LARGEST_KEPT + 1)
    return next((m for m in kept if math.comb(k, m + 1) <= UNPROVED_SHARE * n_groups**m), None)


def candidate_blocks(blocks: Mapping[str, int], n_latents: int, k: int) -> CandidateBlocks | None:
    """`blocks` (all of a configuration but KEPT) with the KEPT that n_latents and k ask for, or None where design B
    should not run."""
    kept = kept_for(-(-n_latents // blocks["BLOCK_LATENTS"]) * (blocks["BLOCK_LATENTS"] // blocks["GROUP"]), k)
    if kept is None or kept >= blocks["GROUP"]:
        return None
    found = CandidateBlocks(**blocks, KEPT=kept)
    return found if found.fits(n_latents, k) else None


def default_blocks(n_latents: int, k: int, dtype: torch.dtype) -> CandidateBlocks | None:
    """The configuration without a tuning table: design A's product, and eight groups a tile, or four where eight are too
    many for the selection. None where design B should not run."""
    found = (candidate_blocks(default_product(dtype) | {"GROUP": group}, n_latents, k) for group in (16, 32))
    return next((blocks for blocks in found if blocks is not None), None)


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _latent_of(group, place, n_tiles, TILE_GROUPS: tl.constexpr):
    """The latent at `place` of a group. Groups are numbered by tile, latents by place, then group in the tile, then tile:
    group = latent mod (n_tiles TILE_GROUPS) up to their order, and latents of a group rise with their place."""
    return (place * TILE_GROUPS + group % TILE_GROUPS) * n_tiles + group // TILE_GROUPS


@jit_over_rows
def _topk_candidates_product_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    scores_ptr,
    places_ptr,
    rows,
    n_latents,
    d,
    n_tiles,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_bias_latent,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of every group of x W_enc^T + bias: the ordered values of the KEPT best (signed: of magnitudes) and of the next,
    scores [rows, KEPT + 1, n_groups]; the places of the KEPT, plus GROUP where negative, places [rows, KEPT, n_groups]."""
    TILE_GROUPS: tl.constexpr = BLOCK_LATENTS // GROUP
    # Columns that differ in their lowest three bits are in different threads, those that differ in the others are not
    # (unless warps share a row): a group is made of these.
    INNER: tl.constexpr = 8 if TILE_GROUPS >= 8 else TILE_GROUPS  # min() of constants is no constant in triton 3.3
    OUTER: tl.constexpr = TILE_GROUPS // INNER
    # Programs that share latents are neighbours: a tile of W_enc comes from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = ((tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    tile = tl.program_id(0) // row_blocks
    column = tl.arange(0, BLOCK_LATENTS)
    group = tile * TILE_GROUPS + (column // (GROUP * INNER)) * INNER + column % INNER
    latent = _latent_of(group, (column // INNER) % GROUP, n_tiles, TILE_GROUPS).to(tl.int64)
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
    bias = tl.load(bias_ptr + latent * stride_bias_latent, mask=latent < n_latents, other=0.0)
    a = total + bias[None, :].to(tl.float32)
    score = tl.where((latent < n_latents)[None, :], ordered(tl.abs(a) if SIGNED else a), -0x80000000)
    score = tl.reshape(score, [BLOCK_ROWS, OUTER, GROUP, INNER])
    if SIGNED:
        negative = tl.reshape((a < 0.0).to(tl.int32), [BLOCK_ROWS, OUTER, GROUP, INNER])
    n_groups = n_tiles * TILE_GROUPS
    out = row[:, None] * ((KEPT + 1) * n_groups) + tile * TILE_GROUPS + tl.arange(0, TILE_GROUPS)[None, :]
    out_place = row[:, None] * (KEPT * n_groups) + tile * TILE_GROUPS + tl.arange(0, TILE_GROUPS)[None, :]
    at = tl.arange(0, GROUP)[None, None, :, None]
    for _ in tl.static_range(KEPT):
        best = tl.max(score, axis=2)  # [BLOCK_ROWS, OUTER, INNER]
        place = tl.min(tl.where(score == best[:, :, None, :], at, GROUP), axis=2)  # the lowest of equal ones
        chosen = at == place[:, :, None, :]
        score = tl.where(chosen, -0x80000000, score)
        if SIGNED:
            place += GROUP * tl.max(tl.where(chosen, negative, 0), axis=2)
        tl.store(scores_ptr + out, tl.reshape(best, [BLOCK_ROWS, TILE_GROUPS]), mask=(row < rows)[:, None])
        place = tl.reshape(place, [BLOCK_ROWS, TILE_GROUPS]).to(tl.int8)
        tl.store(places_ptr + out_place, place, mask=(row < rows)[:, None])
        out += n_groups
        out_place += n_groups
    best = tl.reshape(tl.max(score, axis=2), [BLOCK_ROWS, TILE_GROUPS])
    tl.store(scores_ptr + out, best, mask=(row < rows)[:, None])


@jit_over_rows
def _topk_candidates_select_kernel(
    scores_ptr,
    places_ptr,
    values_ptr,
    indices_ptr,
    groups_ptr,
    kept_ptr,
    list_ptr,
    count_ptr,
    k,
    n_tiles,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    GROUP_HALVINGS: tl.constexpr,
    KEPT_HALVINGS: tl.constexpr,
):
    """One row: its code where the certificate holds. Else its number on the list, groups: those of the k best that left
    out too much (then -1), and kept: keys of the k largest entries that the others kept."""
    row = tl.program_id(0).to(tl.int64)
    n_groups = n_tiles * TILE_GROUPS
    scores_ptr += row * ((KEPT + 1) * n_groups)
    places_ptr += row * (KEPT * n_groups)
    every = tl.arange(0, BLOCK_GROUPS)
    best = tl.load(scores_ptr + every, mask=every < n_groups, other=-0x80000000)  # [BLOCK_GROUPS]
    best_place = tl.load(places_ptr + every, mask=every < n_groups, other=0).to(tl.int32) % GROUP
    slot = tl.arange(0, BLOCK_K)
    if tl.max(best, axis=0) == 0x7FFFFFFF:
        store_broken(values_ptr, indices_ptr, row, k, BLOCK_K)
    else:
        # Equal best entries go by latent, not by group: latents of a later group may be lower.
        keys = entry_key(best, _latent_of(every, best_place, n_tiles, TILE_GROUPS), 0)
        keys = largest_keys(keys, BLOCK_K, LOG_K, GROUP_HALVINGS)
        first = index_of(keys).to(tl.int32) % n_groups  # [BLOCK_K] the groups' first latents
        # Padding has no groups; BLOCK_K may be more than k.
        real = ((keys >> 32).to(tl.int32) > -0x80000000) & (slot < k)
        group = tl.where(real, (first % n_tiles) * TILE_GROUPS + first // n_tiles, 0)
        kept = tl.arange(0, BLOCK_KEPT)[None, :]
        inside = real[:, None] & (kept < KEPT)  # [BLOCK_K, BLOCK_KEPT]
        score = tl.load(scores_ptr + kept * n_groups + group[:, None], mask=inside, other=-0x80000000)
        place = tl.load(places_ptr + kept * n_groups + group[:, None], mask=inside, other=0).to(tl.int32)
        latent = _latent_of(group[:, None], place % GROUP, n_tiles, TILE_GROUPS)
        candidates = tl.reshape(entry_key(score, latent, place // GROUP), [BLOCK_K * BLOCK_KEPT])
        top = largest_keys(candidates, BLOCK_K, LOG_K, KEPT_HALVINGS)
        last = tl.min(tl.where(slot < k, top, 0x7FFFFFFFFFFFFFFF), axis=0) >> 32  # of the first k, which descend
        left_out = tl.load(scores_ptr + KEPT * n_groups + group, mask=real, other=-0x80000000)
        if tl.max(left_out, axis=0) < last:
            store_code(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)
        else:
            tl.store(list_ptr + tl.atomic_add(count_ptr, 1), row.to(tl.int32))
            fails = real & (left_out >= last)
            again = tl.sort(tl.where(fails, group, 0x7FFFFFFF))
            tl.store(groups_ptr + row * BLOCK_K + slot, tl.where(again == 0x7FFFFFFF, -1, again))
            candidates = entry_key(tl.where(fails[:, None], -0x80000000, score), latent, place // GROUP)
            candidates = tl.reshape(candidates, [BLOCK_K * BLOCK_KEPT])
            tl.store(kept_ptr + row * BLOCK_K + slot, largest_keys(candidates, BLOCK_K, LOG_K, KEPT_HALVINGS))


@jit_over_rows
def _topk_candidates_again_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    groups_ptr,
    list_ptr,
    count_ptr,
    a_ptr,
    n_latents,
    d,
    n_tiles,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_bias_latent,
    SLICES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a [row, BLOCK_K, GROUP] = all entries of `groups`, for the rows of the list: a program takes one row and as many
    groups as a tile of the product holds, and then the next such. The tile has one row that is real."""
    TILE_GROUPS: tl.constexpr = BLOCK_LATENTS // GROUP
    column = tl.arange(0, BLOCK_LATENTS)
    first = tl.arange(0, BLOCK_ROWS) == 0
    for unit in range(tl.program_id(0), tl.load(count_ptr) * SLICES, tl.num_programs(0)):
        row = tl.load(list_ptr + unit // SLICES).to(tl.int64)
        slot = (unit % SLICES) * TILE_GROUPS + column // GROUP
        group = tl.load(groups_ptr + row * BLOCK_K + slot, mask=slot < BLOCK_K, other=-1)
        if tl.max(group, axis=0) >= 0:
            latent = _latent_of(group, column % GROUP, n_tiles, TILE_GROUPS).to(tl.int64)
            inside = (group >= 0) & (latent < n_latents)
            total = tile_product(
                x_ptr + tl.where(first, row, 0)[:, None] * stride_x_row,
                W_ptr + latent[:, None] * stride_W_latent,
                first,
                inside,
                d,
                stride_x_d,
                stride_W_d,
                BLOCK_ROWS,
                BLOCK_LATENTS,
                BLOCK_D,
            )
            bias = tl.load(bias_ptr + latent * stride_bias_latent, mask=inside, other=0.0)
            a = total + bias[None, :].to(tl.float32)
            place = row * (BLOCK_K * GROUP) + slot * GROUP + column % GROUP
            place = tl.broadcast_to(place[None, :], [BLOCK_ROWS, BLOCK_LATENTS])
            tl.store(a_ptr + place, a, mask=first[:, None] & inside[None, :])


@jit_over_rows
def _topk_candidates_finish_kernel(
    a_ptr,
    groups_ptr,
    kept_ptr,
    list_ptr,
    count_ptr,
    values_ptr,
    indices_ptr,
    n_latents,
    k,
    n_tiles,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    """The code of the rows of the list: the k largest of all entries of `groups` and of what the others kept."""
    for i in range(tl.program_id(0), tl.load(count_ptr), tl.num_programs(0)):
        row = tl.load(list_ptr + i).to(tl.int64)
        slot = tl.arange(0, BLOCK_K)
        group = tl.load(groups_ptr + row * BLOCK_K + slot)  # [BLOCK_K]
        place = tl.arange(0, GROUP)[None, :]
        latent = _latent_of(group[:, None], place, n_tiles, TILE_GROUPS)  # [BLOCK_K, GROUP]
        inside = (group >= 0)[:, None] & (latent < n_latents)
        a = tl.load(a_ptr + row * (BLOCK_K * GROUP) + slot[:, None] * GROUP + place, mask=inside, other=0.0)
        score = tl.where(inside, ordered(tl.abs(a) if SIGNED else a), -0x80000000)
        keys = entry_key(score, tl.where(inside, latent, 0), (a < 0.0).to(tl.int32))
        top = largest_keys(tl.reshape(keys, [BLOCK_K * GROUP]), BLOCK_K, LOG_K, HALVINGS)
        # The larger of a descending list and an ascending one, place by place, are the largest of both.
        kept = tl.load(kept_ptr + row * BLOCK_K + (BLOCK_K - 1 - slot))
        top = tl.sort(tl.maximum(top, kept), descending=True)
        store_code(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)


def topk_candidates_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, blocks: CandidateBlocks
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of checked arguments. `blocks.fits(n_latents, k)` must hold. Scratch: TRITON_SCRATCH_BYTES, of which
    a row takes (5 KEPT + 4) n_groups bytes where design A takes 4 n_latents."""
    rows, d = x.shape
    n_latents, full = W_enc.shape[0], x.dtype == torch.float32
    relu, signed = selection == "relu", selection == "signed"
    values = x.new_empty(rows, k, dtype=torch.float32)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    if rows == 0:
        return values, indices
    n_groups, group, kept = blocks.n_groups(n_latents), blocks.GROUP, blocks.KEPT
    tile_groups = blocks.BLOCK_LATENTS // group
    n_tiles = n_groups // tile_groups
    block_k, block_groups = next_power_of_2(max(k, 2)), next_power_of_2(max(n_groups, 2))
    block_kept = next_power_of_2(kept)
    bytes_a_row = (5 * kept + 4) * n_groups + block_k * (4 * group + 12) + 4 * d * full + 4
    chunks = row_chunks(rows, bytes_a_row, TRITON_SCRATCH_BYTES, blocks.BLOCK_ROWS)
    chunk = chunks[0].stop
    scores = x.new_empty(chunk, kept + 1, n_groups, dtype=torch.int32)
    places = x.new_empty(chunk, kept, n_groups, dtype=torch.int8)
    a = x.new_empty(chunk, block_k, group, dtype=torch.float32)
    groups = x.new_empty(chunk, block_k, dtype=torch.int32)
    kept_keys = x.new_empty(chunk, block_k, dtype=torch.int64)
    unproved = x.new_empty(chunk, dtype=torch.int32)
    counts = x.new_zeros(len(chunks), 4, dtype=torch.int32)  # one used: every chunk's is aligned to 16 bytes
    tile = {"BLOCK_ROWS": blocks.BLOCK_ROWS, "BLOCK_LATENTS": blocks.BLOCK_LATENTS, "BLOCK_D": blocks.BLOCK_D}
    product = tile | {"GROUP": group, "num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    code = {
        "RELU": relu, "SIGNED": signed, "GROUP": group, "TILE_GROUPS": tile_groups, "BLOCK_K": block_k,
        "LOG_K": block_k.bit_length() - 1,
    }  # fmt: skip
    slices = -(-k // tile_groups)
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre)
        for count, out in zip(counts, chunks, strict=True):
            part = x[out] - b_pre if full else x[out]
            here, out_values, out_indices = part.shape[0], values[out], indices[out]
            strides = *part.stride(), *W_enc.stride(), *bias.stride()
            _topk_candidates_product_kernel[(-(-here // blocks.BLOCK_ROWS) * n_tiles,)](
                part, W_enc, bias, scores, places, here, n_latents, d, n_tiles, *strides,
                SIGNED=signed, KEPT=kept, **product,
            )  # fmt: skip
            _topk_candidates_select_kernel[(here,)](
                scores, places, out_values, out_indices, groups, kept_keys, unproved, count, k, n_tiles, **code,
                KEPT=kept, BLOCK_GROUPS=block_groups, BLOCK_KEPT=block_kept,
                GROUP_HALVINGS=(block_groups // block_k).bit_length() - 1, KEPT_HALVINGS=block_kept.bit_length() - 1,
                num_warps=min(16, max(4, max(block_groups, block_k * block_kept) // 512)),
            )  # fmt: skip
            _topk_candidates_again_kernel[(min(PERSISTENT, here * slices),)](
                part, W_enc, bias, groups, unproved, count, a, n_latents, d, n_tiles, *strides,
                SLICES=slices, BLOCK_K=block_k, **product,
            )  # fmt: skip
            _topk_candidates_finish_kernel[(min(PERSISTENT, here),)](
                a, groups, kept_keys, unproved, count, out_values, out_indices, n_latents, k, n_tiles, **code,
                HALVINGS=group.bit_length() - 1, num_warps=min(16, max(4, block_k * group // 512)),
            )  # fmt: skip
    return values, indices
