"""topk_encode on a GPU where keeping three of every 16 latents is no way to find k: torch's product into a scratch, and the
selection from it. So k may be a large part of the latents, and fp32 is multiplied by IEEE sums.

A program takes a row, which it holds in registers. It bisects for the largest bound that k entries reach: between the least
of the maxima of BLOCK_K disjoint sets, which BLOCK_K and more reach, and the largest entry; and stops as soon as exactly k
reach it. What is above the bound and the first of what is equal to it move to a list, which is sorted.

Longer rows go in pieces. What is left of these, k each, is selected from by the same kernel: of equal values those of lower
latents stand first there too.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ...dispatch import jit, jit_over_rows, next_power_of_2, row_chunks, tl
from ..keys import entry_key, largest_keys, ordered, relu_keys, store_code
from ..product import product_into
from .groups import larger

__all__ = ["stores", "topk_stored"]

LARGEST_K = 1024
MOST_LATENTS = 32768  # of one program: 64 registers of each of its threads
SCRATCH_BYTES = 42 << 20  # of a chunk of rows; beside it GATHERED_BYTES, and what `product_into` may widen
GATHERED_BYTES = 8 << 20  # of the dead latents' weights
# Fewer rows at once, and reading fp32 weights takes longer than multiplying by them (H100: 3 TB/s, 50 TFLOP/s).
LEAST_ROWS = 32
BLOCK_ROWS = 128  # chunks are of whole tiles of a product


def stores(n_latents: int, k: int) -> bool:
    """Whether a row's k largest of n_latents can be found so."""
    left = -(-n_latents // MOST_LATENTS) * k  # of all pieces
    return k <= LARGEST_K and left <= MOST_LATENTS and 4 * n_latents * LEAST_ROWS <= SCRATCH_BYTES


@functools.cache
def _blocks(n: int, k: int) -> dict[str, int]:
    block_k = next_power_of_2(max(k, 2))
    block_n = max(next_power_of_2(n), block_k)
    num_warps = max(1, min(16, max(block_n // 2048, block_k // 256)))
    return {
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "LOG_K": block_k.bit_length() - 1,
        "BLOCK_MOVED": min(block_n, 256 * num_warps),
        "num_warps": num_warps,
    }


# ------------------------------------------------------------------------------------------------------------ Triton


@jit
def _sizes(scores_ptr, bias_ptr, position, n_padded, SIGNED: tl.constexpr, CENTRED: tl.constexpr):
    """The pre-activations at these positions, and what they are ordered by."""
    inside = position < n_padded
    a = tl.load(scores_ptr + position, mask=inside, other=0.0 if SIGNED else float("-inf"))
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + position, mask=inside, other=0.0)
        if not CENTRED:  # made without infinities
            bias = tl.where(bias == -3.4028234663852886e38, float("-inf"), bias)
        a += bias
    return a, tl.abs(a) if SIGNED else a


@jit
def _as_float(place):
    """The number at a place of the order of `ordered`."""
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit_over_rows
def _topk_encode_stored_kernel(
    scores_ptr,
    bias_ptr,
    ids_ptr,
    broken_ptr,
    keys_ptr,
    values_ptr,
    indices_ptr,
    k,
    n_padded,
    first_latent,
    stride_scores_row,
    stride_ids_row,
    stride_code_row,
    RELU: tl.constexpr,
    SIGNED: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOG_K: tl.constexpr,
    BLOCK_MOVED: tl.constexpr,
):
    """The code of one row of scores plus bias, both padded. ids: the latents of its positions, otherwise first_latent
    and following ones; broken: the latents of a row with NaN, otherwise 0 .. k - 1. keys [rows, BLOCK_K] is scratch."""
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * stride_scores_row
    keys_ptr += row * BLOCK_K
    values_ptr += row * stride_code_row
    indices_ptr += row * stride_code_row
    slot = tl.arange(0, BLOCK_K)
    _, size = _sizes(scores_ptr, bias_ptr, tl.arange(0, BLOCK_N), n_padded, SIGNED, CENTRED)  # [BLOCK_N]
    maxima = tl.reduce(tl.reshape(size, [BLOCK_N // BLOCK_K, BLOCK_K]), 0, larger)
    largest = tl.reduce(maxima, 0, larger)
    if largest != largest:
        latent = slot
        if broken_ptr is not None:
            latent = tl.load(broken_ptr + slot, mask=slot < k, other=0).to(tl.int32)
        tl.store(values_ptr + slot, tl.full([BLOCK_K], float("nan"), tl.float32), mask=slot < k)
        tl.store(indices_ptr + slot, latent, mask=slot < k)
    else:
        # k and more reach `bound`, fewer `beyond`: places of the order, whose sums may be no int32.
        bound, beyond = ordered(tl.min(maxima, axis=0)).to(tl.int64), ordered(largest).to(tl.int64) + 1
        reached = 0.0
        while (reached != k) & (beyond - bound > 1):
            middle = (bound + beyond) >> 1
            # Counted as floats, for which a comparison is one instruction and not two.
            count = tl.sum(tl.where(size >= _as_float(middle), 1.0, 0.0), axis=0)
            enough = count >= k
            bound, beyond = tl.where(enough, middle, bound), tl.where(enough, beyond, middle)
            reached = tl.where(enough, count, reached)
        least = _as_float(bound)
        n_ties = k - tl.sum(tl.where(size > least, 1.0, 0.0), axis=0).to(tl.int32)  # of those equal to the bound
        # Read again: beside a whole row there is no room for the sums that give each its place.
        n_above, n_equal = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        for start in range(0, n_padded, BLOCK_MOVED):
            position = start + tl.arange(0, BLOCK_MOVED)
            a, moved = _sizes(scores_ptr, bias_ptr, position, n_padded, SIGNED, CENTRED)
            above, equal = moved > least, moved == least
            both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
            sums = tl.cumsum(both, axis=0)
            equal_so_far = n_equal + (sums >> 16)
            place = n_above + (sums & 0xFFFF) + tl.minimum(equal_so_far, n_ties) - 1
            chosen = above | (equal & (equal_so_far <= n_ties))
            latent = first_latent + position
            if ids_ptr is not None:
                latent = tl.load(ids_ptr + row * stride_ids_row + position, mask=chosen, other=0).to(tl.int32)
            negative = (a < 0.0).to(tl.int32) if SIGNED else 0
            tl.store(keys_ptr + place, entry_key(ordered(moved), latent, negative), mask=chosen)
            total = tl.sum(both, axis=0)
            n_above, n_equal = n_above + (total & 0xFFFF), n_equal + (total >> 16)
        tl.debug_barrier()  # other warps read what these wrote
        keys = tl.load(keys_ptr + slot, mask=slot < k, other=-0x8000000000000000)
        top = largest_keys(keys, BLOCK_K, LOG_K, 0)
        if RELU:
            top = relu_keys(top, k, BLOCK_K)
        store_code(top, values_ptr, indices_ptr, 0, k, SIGNED, BLOCK_K)


def _padded(n: int) -> int:
    """Numbers of a row that begins at a multiple of 64 bytes, as does the next. So loads are wide whatever n is, and a
    number of dead latents that is another at every step is no reason to compile again."""
    return -(-n // 16) * 16


def _rows_of(like: Tensor, rows: int, n: int, signed: bool) -> Tensor:
    """fp32 [rows, n and padding]. Padding never wins: it has the lowest value there is and the last positions."""
    made = like.new_empty(rows, _padded(n), dtype=torch.float32)
    if made.shape[1] > n:
        made[:, n:] = 0 if signed else -torch.inf
    return made


def _launch(
    scores: Tensor, bias: Tensor | None, ids: Tensor | None, broken: Tensor | None, keys: Tensor,
    code: tuple[Tensor, Tensor], k: int, first_latent: int, selection: str, centred: bool,
) -> None:  # fmt: skip
    values, indices = code
    rows, width = scores.shape
    _topk_encode_stored_kernel[(rows,)](
        scores, bias, ids, broken, keys, values, indices, k, width, first_latent, scores.stride(0),
        ids.stride(0) if ids is not None and ids.dim() == 2 else 0, values.stride(0), RELU=selection == "relu",
        SIGNED=selection == "signed", CENTRED=centred, **_blocks(width, k),
    )  # fmt: skip


def _select(
    scores: Tensor, bias: Tensor, dead: Tensor | None, keys: Tensor, code: tuple[Tensor, Tensor], k: int,
    selection: str, centred: bool,
) -> None:  # fmt: skip
    """The code of rows of scores plus bias, both padded."""
    rows, width = scores.shape
    if width <= MOST_LATENTS:
        _launch(scores, bias, dead, dead, keys, code, k, 0, selection, centred)
        return
    kind = "signed" if selection == "signed" else "raw"  # the ReLU comes after the selection
    pieces = row_chunks(width, 1, MOST_LATENTS, block=16)
    values = _rows_of(scores, rows, len(pieces) * k, selection == "signed")
    indices = code[1].new_empty(rows, values.shape[1])
    for i, piece in enumerate(pieces):
        of_piece = values[:, i * k : (i + 1) * k], indices[:, i * k : (i + 1) * k]
        ids = None if dead is None else dead[piece]
        _launch(scores[:, piece], bias[piece], ids, dead, keys, of_piece, k, piece.start, kind, centred)
    _launch(values, None, indices, dead, keys, code, k, 0, selection, centred)


def _tiles(W_enc: Tensor, dead: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """The weights that are multiplied, and the columns of each tile's product."""
    if dead is None:
        yield slice(0, len(W_enc)), W_enc
        return
    for tile in row_chunks(len(dead), W_enc.shape[1] * W_enc.itemsize, GATHERED_BYTES):
        yield tile, W_enc.index_select(0, dead[tile])


def topk_stored(
    x: Tensor, W_enc: Tensor, bias: Tensor, b_pre: Tensor, k: int, selection: str, dead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`topk_encode` of checked arguments that `stores`, among all latents or the `dead`. bias: what `encoder_bias` made of
    these weights."""
    (rows, d), n = x.shape, len(W_enc) if dead is None else len(dead)
    centred = x.dtype == torch.float32
    values, indices = x.new_empty(rows, k, dtype=torch.float32), x.new_empty(rows, k, dtype=torch.int32)
    pieces, block_k = -(-n // MOST_LATENTS), next_power_of_2(max(k, 2))
    bytes_a_row = 4 * (_padded(n) + d) + 8 * block_k + (8 * _padded(pieces * k) if pieces > 1 else 0)
    chunks = row_chunks(rows, bytes_a_row, SCRATCH_BYTES, BLOCK_ROWS)
    most_rows = chunks[0].stop if chunks else 0
    scratch = _rows_of(x, most_rows, n, selection == "signed")
    keys = x.new_empty(most_rows, block_k, dtype=torch.int64)
    bias = bias if dead is None else bias[dead]
    if scratch.shape[1] > n:
        bias = torch.nn.functional.pad(bias, (0, scratch.shape[1] - n))
    gathered_once = dead is None or n * d * W_enc.itemsize <= GATHERED_BYTES
    kept = list(_tiles(W_enc, dead)) if gathered_once else []
    with torch.cuda.device_of(x):
        for part in chunks:
            some = x[part] - b_pre if centred else x[part]
            scores = scratch[: part.stop - part.start]
            for tile, W in kept or _tiles(W_enc, dead):
                product_into(some, W, scores[:, tile])
                del W  # before the next is gathered
            _select(scores, bias, dead, keys, (values[part], indices[part]), k, selection, centred)
    return values, indices
