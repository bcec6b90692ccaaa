"""topk_encode: the exact k largest pre-activations of a sparse autoencoder, without the [rows, n_latents] tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .csr import weight_gradient
from .dispatch import backend, implementation, jit, next_power_of_2, tl, without_autocast
from .tuning_table import tuned

if TYPE_CHECKING:
    from .prefilter import PreparedEncoder

__all__ = ["SELECTIONS", "topk_encode"]

SELECTIONS = ("relu", "signed", "raw")

# Bounds on what one call holds beside its inputs and outputs; together below 64 MiB.
PREACTIVATION_BYTES = 24 << 20  # pre-activations and centred inputs of one chunk of rows; below 32 MiB malloc keeps it
WEIGHT_TILE_BYTES = 12 << 20  # fp32 copy of a block of half-precision latents (CPU path)
SELECTION_BYTES = 1 << 20  # int64 keys of one block of rows on the CPU path: they stay in a core's L2


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str = "relu",
    *,
    prepared: PreparedEncoder | None = None,
) -> tuple[Tensor, Tensor]:
    """The k largest pre-activations of every row, exactly, and the latents they belong to.

        a[r, i] = (x[r] - b_pre) . W_enc[i] + b_enc[i]
        relu:    the k largest a; values max(a, 0). Where fewer than k are positive, the rest of the row holds value 0
                 with the indices of the largest a that are not positive: the selection is made before the ReLU.
        raw:     the k largest a; values a.
        signed:  the k largest |a|; values a.

    Args:
        x: [rows, d], float32, float64, bfloat16 or float16; rows may be 0, strides are free.
        W_enc: [n_latents, d]; b_enc: [n_latents]; b_pre: [d]; dtype and device of x.
        k: 1 <= k <= n_latents.
        selection: "relu", "raw" or "signed".
        prepared: of `prepare_encoder(W_enc, b_enc)`: float32 rows on a CPU with bf16 instructions then go through a
            bf16 product that narrows the search, with a proof for every row. The same contract, in a third of the time
            that the float32 product alone takes; which path a row took shows nowhere but in the last bits. Elsewhere it
            is passed over. Without it the weights are rounded anew by every call large enough to gain by it (of 16 rows
            and more at 20,480 x 1,280; half-precision inputs too): some 0.4 of the product's time at 1,024 rows.

    Returns:
        values [rows, k], float64 for float64 inputs and float32 for all others (the sum is never rounded to half
        precision); indices [rows, k] int32. Sorted by value, largest first (signed: by magnitude); equal values,
        -0.0 and +0.0 among them, by index. Where several latents tie for the last place, the lowest index is in.
        A row in which any a is NaN has k NaN values and the indices 0 .. k - 1. Infinities are ordered like numbers.

    Precision: sums are held in fp32 (fp64 for float64 inputs); fp32 products are IEEE, never TF32. Gradients reach x,
    W_enc, b_enc and b_pre through the entries whose value is not 0, without float atomics: the same bits every run.

    Cost: 2 rows n_latents d FLOPs; reads W_enc once a chunk of rows. Never holds [rows, n_latents]: scratch stays
    below 64 MiB whatever rows is (as long as one row of pre-activations, 4 n_latents bytes, does too).

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices, k or selection.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> topk_encode(x, W_enc, torch.zeros(4), torch.zeros(2), k=2)
        (tensor([[3., 2.]]), tensor([[2, 0]], dtype=torch.int32))
    """
    if prepared is not None:
        from .prefilter import topk_encode_prefiltered

        return topk_encode_prefiltered(x, W_enc, b_enc, b_pre, k, selection, prepared)
    values, indices = torch.ops.sparsefeat.topk_encode(x, W_enc, b_enc, b_pre, k, selection)
    return values, indices


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str = "relu"
) -> tuple[Tensor, Tensor]:
    """The meaning of topk_encode: dense, any dtype."""
    a = (x - b_pre) @ W_enc.T + b_enc
    score = (a.abs() if selection == "signed" else a) + 0.0  # + 0.0 makes -0.0 equal to +0.0 for every sort
    chosen = score.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    values = a.gather(1, chosen)
    values = values.relu() if selection == "relu" else values
    order = (
        ((values.abs() if selection == "signed" else values) + 0.0).sort(dim=1, descending=True, stable=True).indices
    )
    broken = a.isnan().any(dim=1, keepdim=True)
    indices = torch.where(broken, torch.arange(k, device=x.device), chosen.gather(1, order))
    return torch.where(broken, torch.nan, values.gather(1, order)), indices.to(torch.int32)


def _check(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be [rows, d], got shape {tuple(x.shape)}; flatten leading dimensions first")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"x must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if W_enc.dim() != 2 or W_enc.shape[1] != x.shape[1]:
        raise ValueError(f"W_enc must be [n_latents, {x.shape[1]}] to match x, got shape {tuple(W_enc.shape)}")
    for name, tensor, length in (("b_enc", b_enc, W_enc.shape[0]), ("b_pre", b_pre, x.shape[1])):
        if tensor.dim() != 1 or tensor.shape[0] != length:
            raise ValueError(f"{name} must have shape ({length},), got {tuple(tensor.shape)}")
    for name, tensor in (("W_enc", W_enc), ("b_enc", b_enc), ("b_pre", b_pre)):
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have x's dtype {x.dtype}, got {tensor.dtype}; cast one of them")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}; move one of them")
    if not 1 <= k <= W_enc.shape[0]:
        raise ValueError(f"k must be between 1 and n_latents = {W_enc.shape[0]}, got {k}")
    if selection not in SELECTIONS:
        raise ValueError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")


def _value_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------------- CPU
# Rows go in chunks. A chunk's pre-activations are one matrix product into a scratch that every chunk reuses. To select,
# the scratch is read once for the largest value of every group of neighbouring latents; a row's k largest entries lie
# in the k groups with the largest maxima (ties: the lower group), because an entry of any other group is beaten by the
# k maxima. So only k * group values of n_latents are looked at again.


def _group_size(n_latents: int, k: int) -> int:
    """Latents a group: the power of two near sqrt(n / k), where maxima (n / group) and candidates (k * group) are as few
    as they can be together. 1 when groups would not pay, that is when k is a large part of n."""
    size = next_power_of_2(int((n_latents / k) ** 0.5))
    return size if size >= 4 else 1


def _topk_encode_cpu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str,
    also: Callable[[Tensor, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`also(a, first_row)` sees every chunk's pre-activations [chunk, n_latents] before the next takes their place."""
    rows, d = x.shape
    n_latents, dtype = W_enc.shape[0], _value_dtype(x)
    group = _group_size(n_latents, k)
    padded = -(-n_latents // group) * group
    values = x.new_empty(rows, k, dtype=dtype)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    chunk = max(1, min(rows, PREACTIVATION_BYTES // ((padded + d) * dtype.itemsize)))
    chunk = -(-rows // -(-rows // chunk)) if rows else 1  # as many chunks, of equal size
    scratch = x.new_empty(chunk, padded, dtype=dtype)
    # Padding never wins: it has the lowest value there is and the highest indices.
    scratch[:, n_latents:] = 0 if selection == "signed" else -torch.inf
    select_rows = max(1, SELECTION_BYTES // (8 * max(k * group, padded // group)))
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        a = scratch[: part.stop - part.start]
        _preactivations(x[part], W_enc, b_enc, b_pre, a[:, :n_latents])
        for first in range(0, a.shape[0], select_rows):
            block = slice(first, min(first + select_rows, a.shape[0]))
            out = slice(start + block.start, start + block.stop)
            values[out], indices[out] = _select(a[block], k, group, selection)
        if also is not None:
            also(a[:, :n_latents], start)
    return values, indices


def _preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, out: Tensor) -> None:
    """(x - b_pre) W_enc^T + b_enc into `out`, in out's dtype; half-precision weights are widened a tile at a time."""
    centred = x.to(out.dtype) - b_pre.to(out.dtype)
    if W_enc.dtype == out.dtype:
        torch.addmm(b_enc, centred, W_enc.T, out=out)
        return
    tile = max(1, WEIGHT_TILE_BYTES // (out.dtype.itemsize * max(W_enc.shape[1], 1)))
    for start in range(0, W_enc.shape[0], tile):
        latents = slice(start, start + tile)
        torch.addmm(b_enc[latents].to(out.dtype), centred, W_enc[latents].to(out.dtype).T, out=out[:, latents])


def _select(a: Tensor, k: int, group: int, selection: str) -> tuple[Tensor, Tensor]:
    """Values and columns of the k entries of every row of `a` [rows, groups * group] that `selection` asks for."""
    rows, signed = a.shape[0], selection == "signed"
    if group == 1:
        columns = _largest(a, k, signed)
        broken = a.isnan().any(dim=1)
    else:
        grouped = a.view(rows, -1, group)
        maxima = grouped.amax(dim=2)
        if signed:
            maxima = torch.maximum(maxima, -grouped.amin(dim=2))
        broken = maxima.isnan().any(dim=1)
        searched = min(k, maxima.shape[1])
        groups = _largest(maxima, searched, signed=False).sort(dim=1).values  # ascending: candidates in index order
        first_group = torch.arange(rows, device=a.device)[:, None] * maxima.shape[1]
        candidates = a.view(-1, group).index_select(0, (groups + first_group).view(-1)).view(rows, -1)
        place = _largest(candidates, k, signed)
        columns = groups.gather(1, place // group) * group + place % group
    values = a.gather(1, columns)
    # On a CPU a look saves the work; elsewhere the host would wait for the device to answer. The result is the same.
    look = a.device.type == "cpu"
    if selection == "relu" and not (look and bool((values[:, -1] > 0).all())):
        columns = columns.sort(dim=1).values  # what the ReLU makes equal goes by index too
        values = a.gather(1, columns).clamp_(min=0)
        order = _largest(values, k, signed=False)
        values, columns = values.gather(1, order), columns.gather(1, order)
    if not look or bool(broken.any()):
        values = torch.where(broken[:, None], torch.nan, values)
        columns = torch.where(broken[:, None], torch.arange(k, device=a.device), columns)
    return values, columns


def _largest(values: Tensor, k: int, signed: bool) -> Tensor:
    """[rows, k] positions of the k largest values of every row (signed: magnitudes), equal ones by position.

    A float's bits, read as an integer with the magnitude bits of negative numbers flipped, are ordered as the floats
    are. Above the complement of the position they make a key without ties, so any top-k of the keys is the stable one.
    NaN is not ordered here.
    """
    score = values.abs() if signed else values + 0.0  # + 0.0: -0.0 becomes +0.0
    if values.dtype == torch.float64:  # no room beside 64 bits of value
        return score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    bits = score.view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    keys += torch.arange(values.shape[1] - 1, -1, -1, device=values.device)
    return (values.shape[1] - 1) - (keys.topk(k, dim=1).values & 0xFFFFFFFF)


# ------------------------------------------------------------------------------------------------------------ Triton
# The same idea. A chunk's product runs on the tensor cores and leaves fp32 pre-activations in a scratch that stays in
# the L2 cache (A100 40 MiB, H100 50 MiB, MI300X 256 MiB behind it); its epilogue also leaves the maximum of every group.
# A second kernel takes one row a program: the k best groups, then the k best of their k * group entries, both as one
# top-k of int64 keys (ordered value, complement of the index), which have no ties.
# Half-precision inputs are not centred, since x - b_pre rounded to half precision would lose more than the product:
# b_pre goes into the bias, b_enc - W_enc b_pre, in fp32.

TRITON_GROUPS = (4, 128)  # smallest and largest group: the largest is BLOCK_LATENTS of the product
TRITON_SCRATCH_BYTES = 48 << 20  # pre-activations, maxima and centred inputs of a chunk: 512 rows at 20,480 latents
PRODUCT_TILE = {"BLOCK_ROWS": 128, "BLOCK_LATENTS": 128, "BLOCK_D": 64}
MAX_KEYS = 8192  # keys of one program of the selection, which sorts through 64 KiB of shared memory


@jit
def _ordered(values):
    """int32 ordered as fp32 values are: -0.0 equals +0.0, NaN of either sign is the largest int32."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is +0.0
    return tl.where(values == values, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@jit
def _key(ordered, index):
    """int64 that sorts by `ordered`, equal ones by lower index first."""
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@jit
def _merge_descending(x, ROWS: tl.constexpr, K: tl.constexpr, LOG_K: tl.constexpr):
    """Rows of [ROWS, K] that first fall and then rise (or the reverse), sorted: log K exchanges where a sort takes
    log K (log K + 1) / 2."""
    first = (tl.arange(0, 2) == 0)[None, :, None]
    for step in tl.static_range(LOG_K):
        pairs = tl.reshape(x, [ROWS << step, 2, K >> (step + 1)])
        high, low = tl.max(pairs, axis=1)[:, None, :], tl.min(pairs, axis=1)[:, None, :]
        x = tl.reshape(tl.where(first, high, low), [ROWS, K])
    return x


@jit
def _largest_keys(keys, K: tl.constexpr, LOG_K: tl.constexpr, HALVINGS: tl.constexpr):
    """The K largest of [K << HALVINGS] keys, descending.

    Rows of K are sorted, odd ones ascending (as complements), so that the larger of each pair of neighbours in a
    descending and an ascending row are the K largest of both, and fall and rise. (tl.topk does this, from Triton 3.4.)
    """
    flip = -(tl.arange(0, 1 << HALVINGS) & 1).to(tl.int64)[:, None]  # 0 or -1: x ^ -1 is ~x
    x = tl.sort(tl.reshape(keys, [1 << HALVINGS, K]) ^ flip, dim=1, descending=True) ^ flip
    for level in tl.static_range(HALVINGS):
        x = tl.max(tl.reshape(x, [1 << (HALVINGS - level - 1), 2, K]), axis=1)
        flip = -(tl.arange(0, 1 << (HALVINGS - level - 1)) & 1).to(tl.int64)[:, None]
        x = _merge_descending(x ^ flip, 1 << (HALVINGS - level - 1), K, LOG_K) ^ flip
    return tl.reshape(x, [K])


@jit
def _topk_encode_bias_kernel(
    W_ptr,
    b_enc_ptr,
    b_pre_ptr,
    bias_ptr,
    n_latents,
    d,
    stride_W_latent,
    stride_W_d,
    stride_b_enc_latent,
    stride_b_pre_d,
    BLOCK_LATENTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """bias = b_enc - W_enc b_pre, in fp32."""
    latent = tl.program_id(0).to(tl.int64) * BLOCK_LATENTS + tl.arange(0, BLOCK_LATENTS)
    total = tl.zeros([BLOCK_LATENTS, BLOCK_D], tl.float32)
    for start in range(0, d, BLOCK_D):
        column = (start + tl.arange(0, BLOCK_D)).to(tl.int64)
        inside = (latent < n_latents)[:, None] & (column < d)[None, :]
        w = tl.load(W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d, mask=inside, other=0.0)
        b = tl.load(b_pre_ptr + column * stride_b_pre_d, mask=column < d, other=0.0)
        total += w.to(tl.float32) * b.to(tl.float32)[None, :]  # [BLOCK_LATENTS, BLOCK_D]
    b_enc = tl.load(b_enc_ptr + latent * stride_b_enc_latent, mask=latent < n_latents, other=0.0).to(tl.float32)
    tl.store(bias_ptr + latent, b_enc - tl.sum(total, axis=1), mask=latent < n_latents)


@jit
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
    column = tl.arange(0, BLOCK_D)
    row_of_x = row
    if LISTED:
        rows = tl.load(count_ptr)
        if (tl.program_id(0) % row_blocks) * BLOCK_ROWS >= rows:
            return
        row_of_x = tl.load(list_ptr + row, mask=row < rows, other=0).to(tl.int64)
    x_ptrs = x_ptr + row_of_x[:, None] * stride_x_row + column[None, :] * stride_x_d
    W_ptrs = W_ptr + latent[:, None] * stride_W_latent + column[None, :] * stride_W_d
    total = tl.zeros([BLOCK_ROWS, BLOCK_LATENTS], tl.float32)
    for start in range(0, d, BLOCK_D):
        left = d - start
        x = tl.load(x_ptrs, mask=(row < rows)[:, None] & (column < left)[None, :], other=0.0)  # [BLOCK_ROWS, BLOCK_D]
        w = tl.load(W_ptrs, mask=(latent < n_latents)[:, None] & (column < left)[None, :], other=0.0)
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")  # [BLOCK_ROWS, BLOCK_LATENTS]
        x_ptrs += BLOCK_D * stride_x_d
        W_ptrs += BLOCK_D * stride_W_d
    bias = tl.load(bias_ptr + latent * stride_bias_latent, mask=latent < n_latents, other=0.0)
    a = total + bias[None, :].to(tl.float32)
    inside = (row < rows)[:, None] & (latent < n_latents)[None, :]
    tl.store(scratch_ptr + row[:, None] * stride_scratch_row + latent[None, :], a, mask=inside)
    score = _ordered(tl.abs(a) if SIGNED else a)
    score = tl.where((latent < n_latents)[None, :], score, -0x80000000)
    maxima = tl.max(tl.reshape(score, [BLOCK_ROWS, BLOCK_LATENTS // GROUP, GROUP]), axis=2)
    group = latent_block * (BLOCK_LATENTS // GROUP) + tl.arange(0, BLOCK_LATENTS // GROUP)
    inside = (row < rows)[:, None] & (group < n_groups)[None, :]
    tl.store(maxima_ptr + row[:, None] * n_groups + group[None, :], maxima, mask=inside)


@jit
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
    best = _largest_keys(_key(maxima, group), BLOCK_SEARCHED, LOG_SEARCHED, GROUP_HALVINGS)
    best = 0x7FFFFFFF - (best & 0xFFFFFFFF)  # [BLOCK_SEARCHED] groups
    latent = best[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # [BLOCK_SEARCHED, GROUP]
    a = tl.load(scratch_ptr + latent, mask=latent < n_latents, other=0.0)
    score = tl.where(latent < n_latents, _ordered(tl.abs(a) if SIGNED else a), -0x80000000)
    keys = tl.reshape(_key(score, latent), [BLOCK_SEARCHED * GROUP])
    top = _largest_keys(keys, BLOCK_K, LOG_K, CANDIDATE_HALVINGS)
    place = tl.arange(0, BLOCK_K)
    latent = 0x7FFFFFFF - (top & 0xFFFFFFFF)  # [BLOCK_K]
    value = tl.load(scratch_ptr + latent, mask=place < k, other=0.0)
    if RELU:  # what the ReLU makes equal goes by index too
        keys = _key(_ordered(tl.maximum(value, 0.0)), latent)
        keys = tl.sort(tl.where(place < k, keys, -1), descending=True)  # keys of values >= 0 are not negative
        latent = 0x7FFFFFFF - (keys & 0xFFFFFFFF)
        value = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    latent = tl.where(broken, place, latent)
    tl.store(values_ptr + row * k + place, tl.where(broken, float("nan"), value), mask=place < k)
    tl.store(indices_ptr + row * k + place, latent.to(tl.int32), mask=place < k)


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
        group = min(max(_group_size(n_latents, k), smallest), largest, block_latents)
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


def default_product(dtype: torch.dtype) -> dict[str, int]:
    """Block sizes, warps and stages of the product without a tuning table.

    fp32 products are fused multiply-adds of registers: tiles are small. Half precision: 96 KiB of shared memory for
    three stages, which is what the smaller GPUs of each generation have (AMD: 64 KiB and two stages).
    """
    if dtype == torch.float32:
        return {"BLOCK_ROWS": 64, "BLOCK_LATENTS": 128, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}
    return {**PRODUCT_TILE, "num_warps": 8, "num_stages": 2 if backend() == "hip" else 3}


def _topk_encode_triton(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    k: int,
    selection: str,
    also: Callable[[Tensor, int], None] | None = None,
    blocks: Mapping[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """`also`: of `_topk_encode_cpu`. `blocks`: the product's block sizes, warps and stages, of a tuning table."""
    rows, d = x.shape
    n_latents, signed, full = W_enc.shape[0], selection == "signed", x.dtype == torch.float32
    values = x.new_empty(rows, k, dtype=torch.float32)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    if rows == 0:
        return values, indices
    blocks = default_product(x.dtype) if blocks is None else blocks
    tile = {name: blocks[name] for name in PRODUCT_TILE}
    select = SelectSizes.of(n_latents, k, tile["BLOCK_LATENTS"])
    group, n_groups, padded = select.group, select.n_groups, select.n_groups * select.group
    chunk = max(1, min(rows, TRITON_SCRATCH_BYTES // (4 * (padded + n_groups + d))))
    if chunk > tile["BLOCK_ROWS"]:
        chunk -= chunk % tile["BLOCK_ROWS"]
    scratch = x.new_empty(chunk, padded, dtype=torch.float32)
    maxima = x.new_empty(chunk, n_groups, dtype=torch.int32)
    with torch.cuda.device_of(x):
        if full:
            bias = b_enc
        else:
            bias = x.new_empty(n_latents, dtype=torch.float32)
            _topk_encode_bias_kernel[(-(-n_latents // 16),)](
                W_enc, b_enc, b_pre, bias, n_latents, d, *W_enc.stride(), *b_enc.stride(), *b_pre.stride(),
                BLOCK_LATENTS=16, BLOCK_D=128, num_warps=4,
            )  # fmt: skip
        for start in range(0, rows, chunk):
            part = x[start : start + chunk]
            part = part - b_pre if full else part
            programs = -(-part.shape[0] // tile["BLOCK_ROWS"]) * -(-n_latents // tile["BLOCK_LATENTS"])
            unlisted = maxima, maxima  # no list: whatever is passed is not read
            _topk_encode_product_kernel[(programs,)](
                part, W_enc, bias, scratch, maxima, *unlisted, part.shape[0], n_latents, d, *part.stride(),
                *W_enc.stride(), *bias.stride(), padded, n_groups, SIGNED=signed, LISTED=False, GROUP=group, **blocks,
            )  # fmt: skip
            out = slice(start, start + part.shape[0])
            if also is not None:
                also(scratch[: part.shape[0], :n_latents], start)
            if not select.fits:
                a = scratch[: part.shape[0]]
                a[:, n_latents:] = 0 if signed else -torch.inf
                values[out], indices[out] = _select(a, k, group, selection)
                continue
            _topk_encode_select_kernel[(part.shape[0],)](
                scratch, maxima, values[out], indices[out], *unlisted, n_latents, k, padded, n_groups,
                RELU=selection == "relu", SIGNED=signed, LISTED=False, **select.blocks,
            )  # fmt: skip
    return values, indices


# ------------------------------------------------------------------------------------------------------- registration


def _topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, k, selection)
    if implementation(x) != "triton":
        from .prefilter import _topk_encode_prefiltered_cpu, pays_to_round  # it imports this file

        if pays_to_round(x, W_enc):
            return _topk_encode_prefiltered_cpu(x, W_enc, b_enc, b_pre, None, None, k, selection)
        return _topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection)
    entry = tuned("topk_encode", W_enc, x.shape[0], k)
    if entry is not None and entry.design == "B":  # design A is above; B is in a file that imports this one
        from .topk_candidates import _topk_candidates_triton, candidate_blocks

        candidates = candidate_blocks(entry.blocks, W_enc.shape[0], k)
        if candidates is not None:
            return _topk_candidates_triton(x, W_enc, b_enc, b_pre, k, selection, candidates)
        entry = None
    return _topk_encode_triton(x, W_enc, b_enc, b_pre, k, selection, blocks=None if entry is None else entry.blocks)


def _topk_encode_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, k, selection)
    return x.new_empty(x.shape[0], k, dtype=_value_dtype(x)), x.new_empty(x.shape[0], k, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre, _, _ = inputs
    values, indices = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(x, W_enc, b_pre, values, indices)


def _backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """With g the gradient of the values, 0 where a value is 0, and z its dense form:
    x: z W_enc; W_enc: z^T (x - b_pre); b_enc: column sums of z; b_pre: -(column sums of z) W_enc, which needs no sum
    over rows of [rows, d]."""
    x, W_enc, b_pre, values, indices = ctx.saved_tensors
    need_x, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    g = torch.where(values != 0, grad_values, 0)
    grad_x = grad_W = grad_b_enc = grad_b_pre = None
    if need_x:
        grad_x = torch.ops.sparsefeat.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
    if need_W or need_b_enc or need_b_pre:
        weight, bias = weight_gradient(g, indices, x, b_pre, W_enc.shape[0])
        grad_W = weight if need_W else None
        grad_b_enc = bias.to(x.dtype) if need_b_enc else None
        if need_b_pre:
            with torch.autocast(x.device.type, enabled=False):
                grad_b_pre = -(bias.to(x.dtype) @ W_enc)
    return grad_x, grad_W, grad_b_enc, grad_b_pre, None, None


_topk_encode_op = torch.library.custom_op(
    "sparsefeat::topk_encode",
    without_autocast(_topk_encode),
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, SymInt k, str selection) -> (Tensor, Tensor)",
)
_topk_encode_op.register_fake(_topk_encode_fake)
_topk_encode_op.register_autograd(_backward, setup_context=_setup_context)
