"""topk_encode on a GPU, in three launches: a product that keeps the best of its groups, the selection, what it could not prove.

Pre-activations never leave the registers, and W is read once by every chunk of a thousand rows and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...dispatch import implementation, row_chunks
from ..product import encoder_bias
from .groups import GROUP, PLANES, kept_bytes, launch_product, n_groups_of
from .select import LARGEST_K, MOST_GROUPS, Selected, entries_of, launch_repair, launch_select, sizes_of
from .stored import stores
from .tiles import Operands, chunks_of, default_tile

__all__ = ["Way", "selects", "takes_stored", "topk_encode_triton", "way"]

# Three of every 16 latents kept, pre-activations stored, plain torch.
Way = Literal["groups", "stored", "torch"]

# Of rows with a suspect, of latents spread by chance. Each costs a program two groups of latents and more.
MOST_UNPROVED = 0.25
MOST_ROWS = 8192  # whose states, 8 bytes of k, are kept from chunk to chunk of latents


def selects(n_latents: int, k: int) -> bool:
    """Whether groups of 16 that keep three are a way to find k of n_latents: by the expected number of groups that hold
    three of the k largest."""
    groups = max(1, n_latents // GROUP)
    return k <= LARGEST_K and math.comb(k, 3) <= MOST_UNPROVED * groups**2


def takes_stored(x: Tensor, n_latents: int, k: int) -> bool:
    """Whether k of n_latents are selected from pre-activations that are stored (stored.py). Its kernel is one of its own,
    by the name of topk_encode_stored; its product is torch's."""
    return implementation("topk_encode_stored", x) == "triton" and stores(n_latents, k)


def way(x: Tensor, n_latents: int, k: int) -> Way:
    """How topk_encode finds k of n_latents. In float32 the product is what takes long, and torch's is the fastest."""
    groups = implementation("topk_encode", x) == "triton" and selects(n_latents, k)
    if groups and x.dtype != torch.float32:
        return "groups"
    if takes_stored(x, n_latents, k):
        return "stored"
    return "groups" if groups else "torch"


def topk_encode_triton(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str,
    bias: Tensor | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of checked arguments with k <= LARGEST_K. bias: what `encoder_bias` made of these weights before;
    blocks: the product's sizes, warps and stages, of a tuning table."""
    rows = x.shape[0]
    values = x.new_empty(rows, k, dtype=torch.float32)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    tile = default_tile(x, W_enc) if blocks is None else blocks
    with torch.cuda.device_of(x):
        bias = encoder_bias(W_enc, b_enc, b_pre) if bias is None and rows else bias
        scratch: tuple[Tensor, ...] = ()
        for some in row_chunks(rows, 1, MOST_ROWS):
            code = _part(some, values), _part(some, indices)
            scratch = _encode_some(_part(some, x), W_enc, b_pre, bias, k, selection, tile, code, scratch)
    return values, indices


def _part(some: slice, tensor: Tensor) -> Tensor:
    """tensor[some], itself where that is all of it: a view takes the host as long as an allocation."""
    return tensor if some.stop - some.start == tensor.shape[0] else tensor[some]


def _encode_some(
    x: Tensor,
    W_enc: Tensor,
    b_pre: Tensor,
    bias: Tensor,
    k: int,
    selection: str,
    tile: Mapping[str, int],
    code: tuple[Tensor, Tensor],
    scratch: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """scratch: that of rows before, as many as these at least; returned for those after."""
    n_latents, signed = W_enc.shape[0], selection == "signed"
    of = Operands.of(x, W_enc, tile)
    bytes_a_row = 4 * 2 * entries_of(k)
    chunks = chunks_of(x, W_enc, tile, kept_bytes(signed), bytes_a_row, MOST_GROUPS * GROUP)
    most_rows = chunks[0][1][0].stop
    most_groups = n_groups_of(chunks[0][0].stop, tile["BLOCK_LATENTS"])
    planes = most_rows, PLANES + signed, most_groups
    if not scratch or scratch[0].numel() < math.prod(planes) or scratch[1].shape[0] < most_rows:
        to = Selected.of(code, sizes_of(1, k).block_k)
        kept, ids = (x.new_empty(*size, dtype=torch.int32) for size in (planes, (most_rows, 2 * entries_of(k))))
        scratch = kept, ids, to.state, to.listed
    else:
        kept, ids, *of_rows_before = scratch
        kept, to = kept.view(-1)[: math.prod(planes)].view(planes), Selected(code, *of_rows_before)
    for part, of_rows in chunks:
        n, first = part.stop - part.start, part.start
        sizes = sizes_of(n_groups_of(n, tile["BLOCK_LATENTS"]), k)
        constants = {
            "RELU": selection == "relu", "SIGNED": signed, "LAST": part.stop == n_latents,
            "STRETCHES": tile["BLOCK_LATENTS"] // 64,
        }  # fmt: skip
        for some in of_rows:
            launch_product(of, b_pre, bias, kept, to.listed, some, part, signed)
            launch_select(kept, ids, to, some, n, first, sizes, constants)
        launch_repair((x, _part(part, W_enc), b_pre, _part(part, bias)), to, first, sizes, constants)
    return scratch
