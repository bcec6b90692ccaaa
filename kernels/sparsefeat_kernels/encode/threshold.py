"""threshold_encode and threshold_encode_csr: every pre-activation above a threshold, without the [rows, n_latents] tensor.

What JumpReLU, ReLU and BatchTopK with a stored threshold compute. Nothing is selected, so after the product there is
only the compaction of what is active, in index order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import implementation, ops, register, row_chunks, sum_dtype
from ..gradient.weight_gradient import weight_gradient
from ..threads import conducted, each, shares, threads, together
from .gpu.threshold import threshold_encode_csr_triton, threshold_encode_triton
from .product import check_encoder, preactivations
from .rounded import RoundedRows, pays_to_round, round_encoder
from .survivors import CANDIDATES, GROUPS, PAIRS, bounds_by_group, entries_that_reach, group_margins, group_maxima

__all__ = ["threshold_encode", "threshold_encode_csr"]

# Bounds on what one call holds beside its inputs and outputs; with the 12 MiB of widened weights that preactivations
# may hold, together below 64 MiB.
PREACTIVATION_BYTES = 24 << 20  # pre-activations and centred inputs of one chunk of rows; below 32 MiB malloc keeps it
COMPACTED_ENTRIES = 1 << 17  # pre-activations compacted at a time: some 80 bytes each, if all of them are active
PIECE_ENTRIES = 9 << 20  # of a growing CSR code: above 32 MiB malloc asks the system for memory and returns it
PADDED_ENTRIES = 1 << 20  # entries of a CSR code that its gradient pads at a time, some 40 bytes each


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations above a threshold, padded to `max_active` a row, and how many there were.

        a[r, i] = (x[r] - b_pre) . W_enc[i] + b_enc[i]
        latent i is active in row r where a[r, i] > max(threshold[i], 0); its value is a[r, i]

    A threshold of 0 is a plain ReLU; a negative one is the same, since values are positive always.

    Args:
        x: [rows, d], float32, float64, bfloat16 or float16; rows may be 0, strides are free.
        W_enc: [n_latents, d]; b_enc: [n_latents]; b_pre: [d]; dtype and device of x.
        threshold: a scalar tensor or [n_latents], any floating dtype; compared in the dtype of the sum. A latent whose
            threshold is NaN or infinite is never active.
        max_active: entries a row is given, 1 <= max_active <= n_latents.

    Returns:
        values [rows, max_active], float64 for float64 inputs and float32 for all others; indices [rows, max_active]
        int32; counts [rows] int32, the true number of active latents. Entries are in order of their index; the rest of
        a row is value 0 at index 0. A row overflows where counts > max_active: it then holds its max_active lowest
        active indices, whatever the values, and counts is still exact. A row in which any a is NaN has max_active NaN
        values, the indices 0 .. max_active - 1 and count 1. An a of +inf is active.

    Precision: sums as in topk_encode, IEEE fp32 (fp64 for float64 inputs). A latent whose a is nearer to the threshold
    than the rounding of its sum may fall on either side. The same bits on every run of the same build, path and shape.

    Gradients reach x, W_enc, b_enc and b_pre through the entries whose value is not 0, without float atomics; not the
    threshold. The host never waits for the device (float64 on a GPU, which takes the CPU path, does).

    Cost: 2 rows n_latents d FLOPs; reads W_enc once a chunk of rows. Scratch stays below 64 MiB whatever rows is (as
    long as one row does, 80 n_latents bytes). On a CPU with bf16 instructions a bf16 product proves most latents
    inactive and only the others are computed in fp32: 0.4 of the fp32 product's time for 100 active of 20,480, as much
    as without where more than some 4 % are active.

    Raises: ValueError or TypeError naming the argument, for wrong shapes, dtypes, devices or max_active.

    Example:
        >>> x = torch.tensor([[2.0, 1.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0), max_active=3)
        (tensor([[2., 3., 0.]]), tensor([[0, 2, 0]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    return ops.threshold_encode(x, W_enc, b_enc, b_pre, threshold, max_active)


def threshold_encode_csr(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold, as a code of rows of different lengths. The host waits for the device.

    The same entries in the same order as threshold_encode's, without a limit: row r owns the entries
    row_offsets[r] .. row_offsets[r + 1] - 1. A row in which any a is NaN has one entry, NaN at index 0.

    Args: as threshold_encode's, without max_active.

    Returns: values [entries]; indices [entries] int32; row_offsets [rows + 1] int64. `entries` depends on the data: the
    host reads it once a chunk of rows.

    Gradients, precision, cost and errors are threshold_encode's; on a CPU at most 72 MiB of the code are held twice, on a
    GPU all of it while its chunks are joined.
    The gradient pads some rows at a time (the host waits once for the lengths) and, with half-precision inputs that
    take several such blocks, sums in a float32 copy of the block's inputs and of the weight gradient.

    Example:
        >>> x = torch.tensor([[2.0, 1.0], [-1.0, 2.0]])
        >>> W_enc = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
        >>> threshold_encode_csr(x, W_enc, torch.zeros(4), torch.zeros(2), torch.tensor(1.0))
        (tensor([2., 3., 2.]), tensor([0, 2, 1], dtype=torch.int32), tensor([0, 2, 3]))
    """
    return ops.threshold_encode_csr(x, W_enc, b_enc, b_pre, threshold)


def reference(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The meaning of threshold_encode: dense, any dtype."""
    a = (x - b_pre) @ W_enc.T + b_enc
    active = (a > threshold.to(a.dtype)) & (a > 0)
    order = (~active).sort(dim=1, stable=True).indices[:, :max_active]  # active ones first, each kind by index
    values = torch.where(active, a, 0).gather(1, order)
    indices = torch.where(values != 0, order, 0)
    broken = a.isnan().any(dim=1)
    values = torch.where(broken[:, None], torch.nan, values)
    indices = torch.where(broken[:, None], torch.arange(max_active, device=x.device), indices)
    return values, indices.to(torch.int32), torch.where(broken, 1, active.sum(1)).to(torch.int32)


def _check(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int | None = None
) -> None:
    if W_enc.dim() == 2 and W_enc.shape[0] == 0:
        raise ValueError(f"W_enc must have at least one latent, got shape {tuple(W_enc.shape)}")
    check_encoder(x, W_enc, b_enc, b_pre, 1, "raw")
    n_latents = W_enc.shape[0]
    if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != n_latents):
        raise ValueError(
            f"threshold must be a scalar tensor or have shape ({n_latents},), got {tuple(threshold.shape)}"
        )
    if not threshold.is_floating_point():
        raise TypeError(f"threshold must be floating point, got {threshold.dtype}; convert it with .float()")
    if threshold.device != x.device:
        raise ValueError(f"threshold must be on x's device {x.device}, got {threshold.device}; move one of them")
    if max_active is not None and not 1 <= max_active <= n_latents:
        raise ValueError(f"max_active must be between 1 and n_latents = {n_latents}, got {max_active}")


# --------------------------------------------------------------------------------------------------------------- CPU
# Rows go in chunks, whose pre-activations are one matrix product into a scratch that every chunk reuses. A chunk is
# compacted some rows at a time: a comparison and a `nonzero`, which lists rows and latents in index order already.
#
# On a processor with bf16 instructions the product is one of bf16 (rounded.py), of which a bound proves most
# latents inactive; the others are computed in fp32 and compared. Its bias is b_enc less the threshold: what is stored is
# the distance from the threshold, so that the rounding of the stored value is least where it matters. Rows with many
# such latents, or without a proof, go the plain way.

GROUPS_ALIVE = 0.6  # a row with more of its groups to look at is computed plainly: 4 % of 20,480 latents active


class _Entries(NamedTuple):
    """The active entries of some rows, row by row, latents ascending."""

    rows: slice
    row: Tensor  # [entries] int64, counted from rows.start
    latent: Tensor  # [entries] int64
    value: Tensor  # [entries]
    counts: Tensor  # [rows] int64
    broken: Tensor  # [rows] bool: a row with NaN, which has one entry


def _entries_cpu(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Entries]:
    group = next((g for g in GROUPS if len(W_enc) % g == 0), None)
    if group is not None and W_enc.is_contiguous() and pays_to_round(x, W_enc):
        return _entries_of_rounded(x, W_enc, b_enc, b_pre, threshold, group)
    return _entries_plainly(x, W_enc, b_enc, b_pre, threshold)


def _entries_of_rounded(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, group: int
) -> Iterator[_Entries]:
    (rows, d), n_latents = x.shape, len(W_enc)
    n_groups = n_latents // group
    floor = threshold.float().clamp_min(0).expand(n_latents)
    never = ~floor.isfinite()
    encoder = round_encoder(W_enc, b_enc.double() - floor.double().masked_fill(never, 0), rows)
    encoder.bounds[2].masked_fill_(never, -torch.inf)  # no upper bound of theirs reaches 0
    group_bounds, entry_bounds = bounds_by_group(encoder, group)
    bias, zeros = b_enc.float(), torch.zeros(rows)
    most_groups = max(1, int(GROUPS_ALIVE * n_groups))
    chunks = row_chunks(rows, 2 * (n_latents + encoder.width) + 12 * d, PREACTIVATION_BYTES)
    product = torch.empty(chunks[0].stop if chunks else 0, n_latents, dtype=torch.bfloat16)
    block = max(1, CANDIDATES // threads() // (most_groups * group))
    for chunk in chunks:
        start, count = chunk.start, chunk.stop - chunk.start
        part, p = encoder.room_for(count), product[:count]
        together(encoder.rounding(x[chunk], b_pre, part))
        together(encoder.product(part, p))
        blocks = [
            slice(first, min(first + block, share.stop))
            for share in shares(count, threads())
            for first in range(share.start, share.stop, block)
        ]
        alive = torch.empty(count, n_groups, dtype=torch.bool)

        def look(some: slice, p: Tensor = p, part: RoundedRows = part, alive: Tensor = alive) -> None:
            top = group_maxima(p[some].view(-1, group, n_groups)).float()  # [block, n_groups]
            alive[some] = top + group_margins(top, part.size[some], part.lost[some], group_bounds) >= 0

        together(each(look, blocks))
        proved = part.provable & (alive.sum(1) <= most_groups)
        if 2 * int(proved.sum()) < count:  # such rows as are dense, or cannot be proved: no more of this
            for e in _entries_plainly(x[start:], W_enc, b_enc, b_pre, threshold):
                yield e._replace(rows=slice(start + e.rows.start, start + e.rows.stop))
            return
        alive &= proved[:, None]
        found: dict[int, tuple[Tensor, Tensor]] = {}  # by first row

        def search(some: slice, p: Tensor = p, part: RoundedRows = part, alive: Tensor = alive) -> None:
            row, latent = entries_that_reach(
                zeros, p[some], alive[some], part.size[some], part.lost[some], entry_bounds, signed=False
            )
            found[some.start] = row + some.start, latent  # noqa: B023

        done = 0
        for first in range(0, len(blocks), threads()):
            several = blocks[first : first + threads()]
            together(each(search, several))
            if sum(len(row) for row, _ in found.values()) < PAIRS and several[-1].stop < count:
                continue
            stop = several[-1].stop
            row, latent = (torch.cat(parts) for parts in zip(*(found[at] for at in sorted(found)), strict=True))
            value = torch.empty(len(row))
            together(encoder.rescoring(part.centred, row, latent, value))
            value += bias[latent]
            active = value > floor[latent]
            row, latent, value = row[active], latent[active], value[active]
            broken = torch.zeros(stop - done, dtype=torch.bool)
            left = (~proved[done:stop]).nonzero()[:, 0] + done
            if len(left):
                entries = [(row, latent, value)]
                for e in _entries_plainly(x[chunk][left], W_enc, b_enc, b_pre, threshold):
                    entries.append((left[e.rows][e.row], e.latent, e.value))
                    broken[left[e.rows] - done] = e.broken
                row, latent, value = (torch.cat(parts) for parts in zip(*entries, strict=True))
            row, order = (row * n_latents + latent).sort()
            row = row // n_latents - done
            counts = torch.bincount(row, minlength=stop - done)
            yield _Entries(slice(start + done, start + stop), row, latent[order], value[order], counts, broken)
            found, done = {}, stop


def _entries_plainly(x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor) -> Iterator[_Entries]:
    rows, d = x.shape
    n_latents, dtype = W_enc.shape[0], sum_dtype(x)
    floor = threshold.to(dtype).clamp_min(0)  # NaN stays: nothing is above it
    chunks = row_chunks(rows, (n_latents + d) * dtype.itemsize, PREACTIVATION_BYTES)
    scratch = x.new_empty(chunks[0].stop if chunks else 0, n_latents, dtype=dtype)
    for chunk in chunks:
        preactivations(x[chunk], W_enc, b_enc, b_pre, scratch[: chunk.stop - chunk.start])
        steps = row_chunks(chunk.stop - chunk.start, n_latents, COMPACTED_ENTRIES)
        done: dict[int, _Entries] = {}  # by first row

        def compact(some: slice, start: int = chunk.start, done: dict[int, _Entries] = done) -> None:
            a = scratch[some]  # [step, n_latents]
            active = a > floor
            broken = a.amax(dim=1).isnan()
            if bool(broken.any()):
                active[broken] = False
                active[broken, 0] = True
                a[broken, 0] = torch.nan
            row, latent = active.nonzero().unbind(1)
            out = slice(start + some.start, start + some.stop)
            done[some.start] = _Entries(out, row, latent, a[row, latent], active.sum(1), broken)

        for first in range(0, len(steps), threads()):
            several = steps[first : first + threads()]
            together(each(compact, several))
            yield from (done.pop(some.start) for some in several)


@conducted
def _threshold_encode_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    values = x.new_zeros(x.shape[0], max_active, dtype=sum_dtype(x))
    indices = x.new_zeros(x.shape[0], max_active, dtype=torch.int32)
    counts = x.new_empty(x.shape[0], dtype=torch.int32)
    for rows, row, latent, value, count, broken in _entries_cpu(x, W_enc, b_enc, b_pre, threshold):
        slot = torch.arange(row.shape[0], device=x.device) - (count.cumsum(0) - count)[row]
        if bool((count > max_active).any()):
            kept = slot < max_active
            row, latent, value, slot = row[kept], latent[kept], value[kept], slot[kept]
        values[rows][row, slot] = value
        indices[rows][row, slot] = latent.to(torch.int32)
        counts[rows] = count
        if bool(broken.any()):
            values[rows][broken] = torch.nan
            indices[rows][broken] = torch.arange(max_active, device=x.device, dtype=torch.int32)
    return values, indices, counts


@conducted
def _threshold_encode_csr_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # A list of chunks' entries, joined, would be the code twice and what malloc keeps in between. Pieces of this size go
    # back to the system one by one, and what is not yet written of one takes no memory.
    size = max(1, min(PIECE_ENTRIES, x.shape[0] * W_enc.shape[0]))
    pieces: list[tuple[Tensor, Tensor]] = []
    row_offsets = x.new_zeros(x.shape[0] + 1, dtype=torch.int64)
    end = 0
    for rows, _, latent, value, count, _ in _entries_cpu(x, W_enc, b_enc, b_pre, threshold):
        row_offsets[1:][rows] = count
        first = 0
        while first < len(value):
            place = end % size
            if place == 0:
                pieces.append((x.new_empty(size, dtype=sum_dtype(x)), x.new_empty(size, dtype=torch.int32)))
            last = min(len(value), first + size - place)
            for piece, part in zip(pieces[-1], (value, latent), strict=True):
                piece[place : place + last - first] = part[first:last]
            end, first = end + last - first, last
    values, indices = x.new_empty(end, dtype=sum_dtype(x)), x.new_empty(end, dtype=torch.int32)
    while pieces:
        start = (len(pieces) - 1) * size
        for joined, piece in zip((values, indices), pieces.pop(), strict=True):
            joined[start : start + size] = piece[: end - start]
    return values, indices, row_offsets.cumsum_(0)


# ---------------------------------------------------------------------------------------------- gradient of a CSR code
# Both gradients pad blocks of rows and hand them to the ops for padded codes. A block's width is that of its own fullest
# row, so that one crowded row widens one block only. Blocks are summed in order.


def _blocks_of_rows(row_offsets: Tensor) -> list[tuple[int, int, int]]:
    """(first row, last row + 1, width) of blocks of at most PADDED_ENTRIES places, or of one row."""
    blocks, first, width = [], 0, 0
    lengths = row_offsets.diff().tolist()
    for row, length in enumerate(lengths):
        if row > first and (row + 1 - first) * max(width, length) > PADDED_ENTRIES:
            blocks.append((first, row, width))
            first, width = row, 0
        width = max(width, length)
    return [*blocks, (first, len(lengths), width)] if lengths else []


def _padded(values: Tensor, indices: Tensor, row_offsets: Tensor, block: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The rows of a block as a padded code."""
    first, last, width = block
    position = row_offsets[first:last, None] + torch.arange(width, device=values.device)  # [last - first, width]
    inside = position < row_offsets[first + 1 : last + 1, None]
    position = torch.where(inside, position, 0)
    return torch.where(inside, values[position], 0), indices[position]


def _csr_grad_x(grad_values: Tensor, indices: Tensor, row_offsets: Tensor, W_enc: Tensor) -> Tensor:
    grad_x = W_enc.new_zeros(row_offsets.shape[0] - 1, W_enc.shape[1])
    for block in _blocks_of_rows(row_offsets):
        padded = _padded(grad_values, indices, row_offsets, block)
        grad_x[block[0] : block[1]] = ops.sparse_decode(*padded, W_enc, W_enc.new_zeros(W_enc.shape[1]))
    return grad_x


def _csr_grad_weights(
    grad_values: Tensor, indices: Tensor, row_offsets: Tensor, x: Tensor, b_pre: Tensor, n_latents: int
) -> tuple[Tensor, Tensor]:
    blocks, dtype = _blocks_of_rows(row_offsets), sum_dtype(x)
    if len(blocks) == 1:
        return weight_gradient(*_padded(grad_values, indices, row_offsets, blocks[0]), x, b_pre, n_latents)
    weight = x.new_zeros(n_latents, x.shape[1], dtype=dtype)
    bias = x.new_zeros(n_latents, dtype=dtype)
    for block in blocks:
        padded = _padded(grad_values, indices, row_offsets, block)
        more_weight, more_bias = weight_gradient(*padded, x[block[0] : block[1]].to(dtype), b_pre.to(dtype), n_latents)
        weight += more_weight
        bias += more_bias
    return weight.to(x.dtype), bias


# ------------------------------------------------------------------------------------------------------- registration


def _threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, max_active)
    run = threshold_encode_triton if implementation("threshold_encode", x) == "triton" else _threshold_encode_cpu
    return run(x, W_enc, b_enc, b_pre, threshold, max_active)


def _threshold_encode_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor, max_active: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold, max_active)
    shape = (x.shape[0], max_active)
    return (
        x.new_empty(shape, dtype=sum_dtype(x)),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(x.shape[0], dtype=torch.int32),
    )


def _threshold_encode_csr(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold)
    run = (
        threshold_encode_csr_triton if implementation("threshold_encode", x) == "triton" else _threshold_encode_csr_cpu
    )
    return run(x, W_enc, b_enc, b_pre, threshold)


def _threshold_encode_csr_fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, threshold)
    entries = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(entries, dtype=sum_dtype(x)),
        x.new_empty(entries, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int64),
    )


def _weight_gradients(ctx: Any, weight: Tensor, bias: Tensor, W_enc: Tensor) -> list[Tensor | None]:
    """The gradients of W_enc, b_enc and b_pre from z^T (x - b_pre) and the column sums of z, the gradient of the code:
    that of b_pre is -(column sums of z) W_enc."""
    _, need_W, need_b_enc, need_b_pre = ctx.needs_input_grad[:4]
    sums = bias.to(W_enc.dtype)
    with torch.autocast(W_enc.device.type, enabled=False):
        return [weight if need_W else None, sums if need_b_enc else None, -(sums @ W_enc) if need_b_pre else None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre, _, _ = inputs
    values, indices, counts = output
    ctx.mark_non_differentiable(indices, counts)
    ctx.save_for_backward(x, W_enc, b_pre, values, indices)


def _backward(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, values, indices = ctx.saved_tensors
    g = torch.where(values != 0, grad_values, 0)
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = ops.sparse_decode(g, indices, W_enc, torch.zeros_like(b_pre))
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = weight_gradient(g, indices, x, b_pre, W_enc.shape[0])
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None, None


def _setup_context_csr(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, _, b_pre, _ = inputs
    _, indices, row_offsets = output
    ctx.mark_non_differentiable(indices, row_offsets)
    ctx.save_for_backward(x, W_enc, b_pre, indices, row_offsets)


def _backward_csr(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, b_pre, indices, row_offsets = ctx.saved_tensors
    grad_x: Tensor | None = None
    grad_weights: list[Tensor | None] = [None, None, None]
    if ctx.needs_input_grad[0]:
        grad_x = ops.threshold_encode_csr_grad_x(grad_values, indices, row_offsets, W_enc)
    if any(ctx.needs_input_grad[1:4]):
        weight, bias = ops.threshold_encode_csr_grad_weights(
            grad_values, indices, row_offsets, x, b_pre, W_enc.shape[0]
        )
        grad_weights = _weight_gradients(ctx, weight, bias, W_enc)
    return grad_x, *grad_weights, None


register(
    "threshold_encode",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold, SymInt max_active) "
    "-> (Tensor, Tensor, Tensor)",
    _threshold_encode,
    fake=_threshold_encode_fake,
    backward=_backward,
    setup_context=_setup_context,
)

register(
    "threshold_encode_csr",
    "(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor threshold) -> (Tensor, Tensor, Tensor)",
    _threshold_encode_csr,
    fake=_threshold_encode_csr_fake,
    backward=_backward_csr,
    setup_context=_setup_context_csr,
)

register(
    "threshold_encode_csr_grad_x",
    "(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor W_enc) -> Tensor",
    _csr_grad_x,
    fake=lambda grad_values, indices, row_offsets, W_enc: W_enc.new_empty(row_offsets.shape[0] - 1, W_enc.shape[1]),
)

register(
    "threshold_encode_csr_grad_weights",
    "(Tensor grad_values, Tensor indices, Tensor row_offsets, Tensor x, Tensor b_pre, SymInt n_latents) "
    "-> (Tensor, Tensor)",
    _csr_grad_weights,
    fake=lambda grad_values, indices, row_offsets, x, b_pre, n_latents: (
        x.new_empty(n_latents, x.shape[1]),
        x.new_empty(n_latents, dtype=sum_dtype(x)),
    ),
)
