"""Design A of topk_encode on a GPU: a chunk's pre-activations in a scratch, the best groups of a row, their best entries.

A chunk's product runs on the tensor cores and leaves fp32 pre-activations in a scratch that stays in the L2 cache (A100 40
MiB, H100 50 MiB, MI300X 256 MiB behind it); its epilogue also leaves the maximum of every group. A second kernel takes one
row a program: the k best groups, then the k best of their k * group entries, both as one top-k of keys without ties.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...dispatch import jit_over_rows, next_power_of_2, row_chunks, tl
from ..cpu import group_size, select
from ..keys import entry_key, index_of, largest_keys, ordered, store_broken, store_code
from ..product import TRITON_SCRATCH_BYTES, default_product, encoder_bias, tile_product

__all__ = ["MAX_KEYS", "SelectSizes", "launch_product", "launch_select", "topk_encode_triton"]

TRITON_GROUPS = (4, 128)  # smallest and largest group: the largest is BLOCK_LATENTS of the product
MAX_KEYS = 8192  # keys of one program of the selection, which sorts through 64 KiB of shared memory


@jit_over_rows
def _topk_encode_product_kernel(
    x_ptr,
    W_ptr,
    bias_ptr,
    scratch_ptr,
    maxima_ptr,
    list_ptr,
    count_ptr,
    rows,
    n_latents,
    d,
    stride_x_row,
    stride_x_d,
    stride_W_latent,
    stride_W_d,
    stride_bias_latent,
    stride_scratch_row,
    n_groups,
    SIGNED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """scratch = x W_enc^T + bias, and the largest ordered value (signed: of magnitudes) of every group of latents.

    LISTED: of the first *count rows that list names, in its order; of no more than `rows`, for which the grid is made.
    """
    # Programs that share latents are neighbours: a tile of W_enc comes from memory once.
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    row = ((tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    latent_block = tl.program_id(0) // row_blocks
    latent = (latent_block * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)).to(tl.int64)
    row_of_x = row
    if LISTED:
        rows = tl.load(count_ptr)
        if (tl.program_id(0) % row_blocks) * BLOCK_ROWS >= rows:
            return
        row_of_x = tl.load(list_ptr + row, mask=row < rows, other=0).to(tl.int64)
    total = tile_product(
        x_ptr + row_of_x[:, None] * stride_x_row,
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
    inside = (row < rows)[:, None] & (latent < n_latents)[None, :]
    tl.store(scratch_ptr + row[:, None] * stride_scratch_row + latent[None, :], a, mask=inside)
    score = ordered(tl.abs(a) if SIGNED else a)
    score = tl.where((latent < n_latents)[None, :], score, -0x80000000)
    maxima = tl.max(tl.reshape(score, [BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP]), axis=2)
    group = latent_block * (BLOCK_LATENTS // GROUP) + tl.arange(0, BLOCK_LATENTS // GROUP)
    inside = (row < rows)[:, None] & (group < n_groups)[None, :]
    tl.store(maxima_ptr + row[:, None] * n_groups + group[None, :], maxima, mask=inside)


@jit_over_rows
def _topk_encode_select_kernel(
    scratch_ptr,
    maxima_ptr,
    values_ptr,
    indices_ptr,
    list_ptr,
    count_ptr,
    n_latents,
    k,
    stride_scratch_row,
    n_groups,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    LISTED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_SEARCHED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_SEARCHED: tl.constexpr,
    LOG_K: tl.constexpr,
    GROUP_HALVINGS: tl.constexpr,
    CANDIDATE_HALVINGS: tl.constexpr,
):
    """The k largest of one row of the scratch: of the groups first, then of the entries of the best groups. LISTED: the
    row of the output is what the first *count of list name."""
    row = tl.program_id(0).to(tl.int64)
    scratch_ptr += row * stride_scratch_row
    maxima_ptr += row * n_groups
    if LISTED:
        if tl.program_id(0) >= tl.load(count_ptr):
            return
        row = tl.load(list_ptr + row).to(tl.int64)
    group = tl.arange(0, BLOCK_GROUPS)
    maxima = tl.load(maxima_ptr + group, mask=group < n_groups, other=-0x80000000)  # [BLOCK_GROUPS]
    broken = tl.max(maxima, axis=0) == 0x7FFFFFFF
    if broken:
        store_broken(values_ptr, indices_ptr, row, k, BLOCK_K)
    else:
        best = index_of(largest_keys(entry_key(maxima, group, 0), BLOCK_SEARCHED, LOG_SEARCHED, GROUP_HALVINGS))
        latent = best[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_SEARCHED, GROUP]
        a = tl.load(scratch_ptr + latent, mask=latent < n_latents, other=0.0)
        score = tl.where(latent < n_latents, ordered(tl.abs(a) if SIGNED else a), -0x80000000)
        keys = tl.reshape(entry_key(score, latent, (a < 0.0).to(tl.int32)), [BLOCK_SEARCHED * GROUP])
        top = largest_keys(keys, BLOCK_K, LOG_K, CANDIDATE_HALVINGS)
        store_code(top, values_ptr, indices_ptr, row, k, RELU, SIGNED, BLOCK_K)


@dataclass(frozen=True)
class SelectSizes:
    """What `_topk_encode_select_kernel` needs to know of a row: `fits` says whether all its keys fit one program."""

    group: int
    n_groups: int
    block_groups: int
    block_searched: int
    block_k: int

    @classmethod
    def of(cls, n_latents: int, k: int, block_latents: int) -> SelectSizes:
        smallest, largest = TRITON_GROUPS
        group = min(max(group_size(n_latents, k), smallest), largest, block_latents)
        n_groups = -(-n_latents // group)
        searched = next_power_of_2(max(min(k, n_groups), 2))
        return cls(group, n_groups, next_power_of_2(max(n_groups, 2)), searched, next_power_of_2(max(k, 2)))

    @property
    def keys(self) -> int:
        return max(self.block_groups, self.block_searched * self.group)

    @property
    def fits(self) -> bool:
        return max(self.keys, self.block_k) <= MAX_KEYS

    @property
    def blocks(self) -> dict[str, int]:
        return {
            "GROUP": self.group,
            "BLOCK_GROUPS": self.block_groups,
            "BLOCK_SEARCHED": self.block_searched,
            "BLOCK_K": self.block_k,
            "LOG_SEARCHED": self.block_searched.bit_length() - 1,
            "LOG_K": self.block_k.bit_length() - 1,
            "GROUP_HALVINGS": (self.block_groups // self.block_searched).bit_length() - 1,
            "CANDIDATE_HALVINGS": (self.block_searched * self.group // self.block_k).bit_length() - 1,
            "num_warps": min(16, max(4, self.keys // 512)),  # 2,048 keys: 8 warps spill on sm_80, 4 do not
        }


def launch_product(
    x: Tensor,
    W: Tensor,
    bias: Tensor,
    scratch: Tensor,
    maxima: Tensor,
    n_groups: int,
    group: int,
    signed: bool,
    blocks: Mapping[str, int],
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Pre-activations of x's rows, or of those that `listed` (rows, how many) names, into scratch and maxima."""
    (rows, d), n_latents = x.shape, W.shape[0]
    programs = -(-rows // blocks["BLOCK_ROWS"]) * -(-n_latents // blocks["BLOCK_LATENTS"])
    rows_listed, count = (maxima, maxima) if listed is None else listed  # without a list what is passed is not read
    _topk_encode_product_kernel[(programs,)](
        x, W, bias, scratch, maxima, rows_listed, count, rows, n_latents, d, *x.stride(), *W.stride(), *bias.stride(),
        scratch.stride(0), n_groups, SIGNED=signed, LISTED=listed is not None, GROUP=group, **blocks,
    )  # fmt: skip


def launch_select(
    scratch: Tensor,
    maxima: Tensor,
    values: Tensor,
    indices: Tensor,
    n_latents: int,
    selection: str,
    sizes: SelectSizes,
    listed: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The codes of the rows that `launch_product` left; `sizes.fits` must hold."""
    rows, k = values.shape
    rows_listed, count = (maxima, maxima) if listed is None else listed
    _topk_encode_select_kernel[(rows,)](
        scratch, maxima, values, indices, rows_listed, count, n_latents, k, scratch.stride(0), sizes.n_groups,
        RELU=selection == "relu", SIGNED=selection == "signed", LISTED=listed is not None, **sizes.blocks,
    )  # fmt: skip


def topk_encode_triton(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str,
    also: Callable[[Tensor, int], None] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`also`: of `topk_encode_cpu`. `blocks`: the product's block sizes, warps and stages, of a tuning table."""
    rows, d = x.shape
    n_latents, signed, full = W_enc.shape[0], selection == "signed", x.dtype == torch.float32
    values = x.new_empty(rows, k, dtype=torch.float32)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    if rows == 0:
        return values, indices
    blocks = default_product(x.dtype) if blocks is None else blocks
    sizes = SelectSizes.of(n_latents, k, blocks["BLOCK_LATENTS"])
    group, n_groups, padded = sizes.group, sizes.n_groups, sizes.n_groups * sizes.group
    chunks = row_chunks(rows, 4 * (padded + n_groups + d), TRITON_SCRATCH_BYTES, blocks["BLOCK_ROWS"])
    scratch = x.new_empty(chunks[0].stop, padded, dtype=torch.float32)
    maxima = x.new_empty(chunks[0].stop, n_groups, dtype=torch.int32)
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre)
        for out in chunks:
            part = x[out] - b_pre if full else x[out]
            a = scratch[: len(part)]
            launch_product(part, W_enc, bias, a, maxima, n_groups, group, signed, blocks)
            if also is not None:
                also(a[:, :n_latents], out.start)
            if sizes.fits:
                launch_select(a, maxima, values[out], indices[out], n_latents, selection, sizes)
            else:
                a[:, n_latents:] = 0 if signed else -torch.inf
                values[out], indices[out] = select(a, k, group, selection)
    return values, indices
