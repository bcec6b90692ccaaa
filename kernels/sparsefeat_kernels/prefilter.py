"""topk_encode through a bf16 product: the exact answer where a bound proves it, the plain path where it does not.

A processor with bf16 matrix instructions multiplies bf16 three to five times as fast as fp32. So the whole product is
made in bf16, a rigorous bound (rounded_encoder.py) tells which latents can be among a row's k largest, and only those are
computed in fp32. The weights in bf16 are prepared once, or rounded a tile of latents at a time for every chunk of rows.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation, without_autocast
from .prefilter_gpu import GROUPS_A_K, PrefilterSizes, _topk_encode_prefiltered_triton, gpu_weights
from .rounded_encoder import (
    BIAS_COLUMNS,
    SMALLEST_PRODUCT,
    RoundedEncoder,
    bias_columns,
    encoder_bounds,
    round_encoder,
    round_into,
    rounded_width,
)
from .topk_encode import (
    PREACTIVATION_BYTES,
    _backward,
    _check,
    _setup_context,
    _topk_encode,
    _topk_encode_cpu,
    _topk_encode_fake,
)
from .tuning_table import tuned

__all__ = ["PreparedEncoder", "bf16_products", "prefilter_pays", "prepare_encoder", "topk_encode_prefiltered"]

GROUPS = (16, 8, 4)  # latents a group, of which one maximum is looked at first
# A row with more groups left is computed plainly: 8 for each of the k; for few k 128, or a quarter of all.
SURVIVING_GROUPS = (8, 128)
COARSER = 4  # groups of which the best lower bound counts, where that leaves enough: a quarter to search, hardly lower
CANDIDATES = 1 << 19  # entries of surviving groups looked at together: 20 MiB of scratch at worst
# What pays to round the weights for: at 16 x 1,280 x 20,480 the prefilter takes 0.7 of the plain path's time (half the
# rows: 1.0), at 64 x 768 x 3,072 1.0; at a width of 64 selection is nearly all there is.
ROUNDED_ROWS, ROUNDED_WIDTH, ROUNDED_PRODUCT = 16, 128, 150_000_000
# Fewer rows at once do not pay for the pass over the weights that the first call after a change makes: it costs as much
# as the prefilter saves at about 60 rows (20,480 x 1280, two cores).
PREFILTERED_ROWS = 128
PAIRS = 1 << 17  # survivors rescored together, 60 bytes each


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """What `topk_encode(..., prepared=)` keeps of an encoder between calls: 2 n_latents (d + 3, rounded up to 32) bytes
    of bf16 weights and 12 n_latents bytes of norms; half the size of fp32 weights (on a GPU 2 n_latents d and 16 n_latents
    bytes). Made by `prepare_encoder`."""

    low: Tensor  # bf16 [n_latents, width]: W_enc, b_enc in three parts, zeros; on a GPU as `gpu_weights` has it
    bounds: Tensor  # fp32 [3, n_latents]: the bound is |x' - x'~| bounds[0] + |x'~| bounds[1] + bounds[2] + 2^-8 |p|
    _weights: tuple[weakref.ref[Tensor], weakref.ref[Tensor]] = field(repr=False)
    _versions: tuple[int, int] = field(repr=False)

    def is_current(self, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether these are the very tensors it was made from, unchanged since (changes through `.data` go unseen)."""
        same = self._weights[0]() is W_enc and self._weights[1]() is b_enc
        return same and self._versions == (W_enc._version, b_enc._version)

    @property
    def nbytes(self) -> int:
        return self.low.nbytes + self.bounds.nbytes


@torch.inference_mode(False)
@torch.no_grad()
def prepare_encoder(W_enc: Tensor, b_enc: Tensor, into: PreparedEncoder | None = None) -> PreparedEncoder:
    """bf16 weights and norms for `topk_encode(..., prepared=)`; make it again when the weights have changed.

    Two passes over the weights: at 20,480 x 1280 a seventh of what the product with 256 rows takes when memory is used
    again (`into`), under a third when it is new (23 and 44 ms beside 151 on one core of an AMD EPYC).

    Args:
        W_enc [n_latents, d], b_enc [n_latents]: float32, on a CPU or a GPU.
        into: an earlier one of the same shape, whose memory is used again (on a CPU); it must not be used any more.

    Raises: TypeError, ValueError for other dtypes and shapes; RuntimeError for tensors made in inference mode, whose
        changes cannot be noticed.
    """
    for name, tensor, dimensions in (("W_enc", W_enc, 2), ("b_enc", b_enc, 1)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{name} must be float32 to be prepared, got {tensor.dtype}; the prefilter speeds up fp32")
        if tensor.dim() != dimensions or tensor.shape[0] != W_enc.shape[0]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; pass W_enc [n_latents, d] and b_enc [n_latents]")
        if tensor.is_inference():
            raise RuntimeError(f"{name} was made in inference mode, where changes go unnoticed; prepare a clone of it")
    weights, versions = (weakref.ref(W_enc), weakref.ref(b_enc)), (W_enc._version, b_enc._version)
    if implementation(W_enc) == "triton":
        return PreparedEncoder(*gpu_weights(W_enc, b_enc), weights, versions)
    width = rounded_width(W_enc.shape[1])
    if into is not None and into.low.shape == (len(W_enc), width):
        low, bounds = into.low, into.bounds
    else:
        low, bounds = torch.zeros(len(W_enc), width, dtype=torch.bfloat16), torch.empty(3, len(W_enc))
    bias = b_enc.detach().double()
    columns, rest = bias_columns(bias)
    round_into(low, W_enc.detach(), columns)
    encoder_bounds(W_enc.detach(), bias, rest, width, bounds)
    return PreparedEncoder(low, bounds, weights, versions)


@functools.cache
def bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware, with sums in fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is not None and ask() for ask in asked)


def prefilter_pays(W_enc: Tensor, rows: int, k: int) -> bool:
    """Whether encoding `rows` rows with prepared weights was measured to be faster than without.

    On a CPU with bf16 instructions: yes, for float32 and PREFILTERED_ROWS rows or more, which also pay for preparing once.
    On a GPU: what the tuning table says of the nearest shape; without a table no.
    """
    if W_enc.dtype != torch.float32:
        return False
    if implementation(W_enc) == "triton":
        plain, prefiltered = (tuned(op, W_enc, rows, k) for op in ("topk_encode", "topk_encode_prefiltered"))
        return plain is not None and prefiltered is not None and prefiltered.median_ms < plain.median_ms
    return W_enc.device.type == "cpu" and rows >= PREFILTERED_ROWS and bf16_products()


def can_prefilter(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether rows like these go through a prefilter on the CPU."""
    on_cpu = x.dtype in dtypes and x.device.type == "cpu" and implementation(x) == "cpu"
    return on_cpu and bf16_products() and getattr(torch.backends.mkldnn, "enabled", True)


def pays_to_round(x: Tensor, W_enc: Tensor) -> bool:
    """Whether a product with rows like these is worth rounding W_enc for, which costs as much as some 10 rows."""
    rows, d = x.shape
    large = rows >= ROUNDED_ROWS and d >= ROUNDED_WIDTH and rows * d * len(W_enc) >= ROUNDED_PRODUCT
    return large and can_prefilter(x, (torch.float32, torch.bfloat16, torch.float16))


def _group(n_latents: int, k: int) -> int | None:
    """Latents a group, or None where the plain path is the better one."""
    fitting = (g for g in GROUPS if n_latents % g == 0 and n_latents // g >= GROUPS_A_K * k)
    return next(fitting, None)


def _most_groups(n_groups: int, k: int) -> int:
    """Groups that may be left in a row that is proved."""
    a_k, few = SURVIVING_GROUPS
    return min(n_groups, max(a_k * k, min(few, n_groups // 4)))


def _topk_encode_prefiltered_cpu(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_pre: Tensor,
    low: Tensor | None,
    bounds: Tensor | None,
    k: int,
    selection: str,
) -> tuple[Tensor, Tensor]:
    """low and bounds: of a PreparedEncoder, or None."""
    rows, d = x.shape
    n_latents, width, group = W_enc.shape[0], rounded_width(d), _group(W_enc.shape[0], k)
    if group is None or not W_enc.is_contiguous() or rows * width * n_latents < SMALLEST_PRODUCT:
        return _topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection)
    if low is None or bounds is None:
        encoder = round_encoder(W_enc, b_enc, rows)
    else:
        largest = float(bounds[0].max()), float(b_enc.abs().max())
        encoder = RoundedEncoder(W_enc, None, low, bounds, largest)
    return _topk_of_rounded(x, encoder, b_enc, b_pre, k, selection, group)


def _topk_of_rounded(
    x: Tensor, encoder: RoundedEncoder, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, group: int
) -> tuple[Tensor, Tensor]:
    """topk_encode through an encoder of W_enc and b_enc; `group` of `_group`."""
    rows, d = x.shape
    n_latents, width = len(encoder.W_enc), encoder.low.shape[1]
    n_groups = n_latents // group
    # Groups are strided: latents that are trained together (the first of a Matryoshka dictionary) fall into different
    # ones, and the maximum over a group is an elementwise one of long vectors.
    group_bounds, entry_bounds = bounds_by_group(encoder, group)
    bias = b_enc.float()
    values = torch.empty(rows, k)
    indices = torch.empty(rows, k, dtype=torch.int32)
    chunk = max(1, min(rows, PREACTIVATION_BYTES // (2 * (n_latents + width) + 12 * d)))
    chunk = -(-rows // -(-rows // chunk))
    product = torch.empty(chunk, n_latents, dtype=torch.bfloat16)
    block = max(1, CANDIDATES // (_most_groups(n_groups, k) * group))
    unproved = [torch.empty(0, dtype=torch.int64)]
    for start in range(0, rows, chunk):
        part = encoder.rows(x[start : start + chunk], b_pre)
        count = len(part.centred)
        p = encoder.product(part, product[:count])
        found: list[tuple[slice, Tensor, Tensor]] = []
        for first in range(0, count, block):
            some = slice(first, min(first + block, count))
            row, latent, proved = _survivors(
                p[some],
                part.size[some],
                part.lost[some],
                part.provable[some],
                group_bounds,
                entry_bounds,
                k,
                selection == "signed",
            )
            found.append((some, row, latent))
            unproved.append((~proved).nonzero()[:, 0] + (start + first))
            if sum(len(row) for _, row, _ in found) < PAIRS and some.stop < count:
                continue
            pairs = torch.cat([row + some.start for some, row, _ in found]), torch.cat([latent for *_, latent in found])
            values_of_all = encoder.exact(part.centred, *pairs) + bias[pairs[1]]
            for some, row, latent in found:
                a, values_of_all = values_of_all.tensor_split([len(row)])
                out = slice(start + some.start, start + some.stop)
                values[out], indices[out] = _largest_of_each_row(a, row, latent, some.stop - some.start, k, selection)
            found = []
        if 2 * sum(len(left) for left in unproved) > start + count:  # such rows as cannot be proved: no more of this
            unproved.append(torch.arange(start + count, rows))
            break
    left = torch.cat(unproved)
    if len(left):
        values[left], indices[left] = _topk_encode_cpu(x[left], encoder.W_enc, b_enc, b_pre, k, selection)
    return values, indices


def _survivors(
    p: Tensor,
    size: Tensor,
    lost: Tensor,
    provable: Tensor,
    group_bounds: Tensor,
    entry_bounds: Tensor,
    k: int,
    signed: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent) of every entry that may be among its row's k largest, rows ascending; and [rows] whether that could
    be told. Of the other rows nothing is returned.

    The k-th largest of the groups' lower bounds is below at least k entries' values. Whatever has its upper bound below
    that cannot be among the k largest.
    """
    n_groups, _, group = entry_bounds.shape
    grouped = p.view(len(p), group, n_groups)
    top = grouped.amax(1).float()  # [rows, n_groups]
    if signed:
        top = torch.maximum(top, -grouped.amin(1).float())
    margin = group_margins(top, size, lost, group_bounds)
    lower = top - margin
    if n_groups % COARSER == 0 and n_groups >= COARSER * GROUPS_A_K * k:
        lower = lower.view(len(p), COARSER, -1).amax(1)
    threshold = lower.topk(k, dim=1, sorted=False).values.amin(1)
    alive = (top + margin) >= threshold[:, None]
    proved = provable & (alive.sum(1) <= _most_groups(n_groups, k))
    alive &= proved[:, None]
    return *entries_that_reach(threshold, p, alive, size, lost, entry_bounds, signed), proved


def bounds_by_group(encoder: RoundedEncoder, group: int) -> tuple[Tensor, Tensor]:
    """The largest bounds of every group [3, n_groups], and those of its entries [n_groups, 3, group]."""
    by_group = encoder.bounds.view(3, group, -1)
    return by_group.amax(1), by_group.permute(2, 0, 1).contiguous()


def group_margins(top: Tensor, size: Tensor, lost: Tensor, group_bounds: Tensor) -> Tensor:
    """How far the entries of a group whose largest is `top` [rows, n_groups] can be from what the product says."""
    margin = torch.outer(lost, group_bounds[0]).addr_(size, group_bounds[1]).add_(group_bounds[2])
    return margin.add_(top.abs(), alpha=2.0**-8)


def entries_that_reach(
    threshold: Tensor, p: Tensor, alive: Tensor, size: Tensor, lost: Tensor, entry_bounds: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """(row, latent), rows ascending, of the entries of groups `alive` [rows, n_groups] whose upper bound reaches their
    row's threshold."""
    n_groups, _, group = entry_bounds.shape
    row, of_group = alive.nonzero(as_tuple=True)
    slots = torch.arange(group) * n_groups
    latent = of_group[:, None] + slots  # [groups alive, group]
    a = p.reshape(-1).take(row[:, None] * (group * n_groups) + latent).float()
    bound = entry_bounds.index_select(0, of_group)  # [groups alive, 3, group]
    upper = (a.abs() if signed else a) + a.abs() * 2.0**-8
    upper += lost[row, None] * bound[:, 0] + size[row, None] * bound[:, 1] + bound[:, 2]
    of_alive, slot = (upper >= threshold[row, None]).nonzero(as_tuple=True)
    return row[of_alive], latent[of_alive, slot]


def _largest_of_each_row(
    a: Tensor, row: Tensor, latent: Tensor, rows: int, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, sorted, equal ones by latent, as topk_encode gives them. A row without
    entries holds whatever: the caller fills it."""
    score = a.abs() if selection == "signed" else a
    keys = _keys(score, latent)
    counts = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    longest = max(int(counts.max()), k) if len(row) else k
    table = torch.full((rows, longest), torch.iinfo(torch.int64).min)
    table[row, place] = keys
    value_of = torch.zeros(rows, longest)
    value_of[row, place] = a
    top, where = table.topk(k, dim=1)
    values, indices = value_of.gather(1, where), 0x7FFFFFFF - (top & 0x7FFFFFFF)
    if selection == "relu" and bool((values[:, -1] <= 0).any()):  # what the ReLU makes equal goes by index too
        values = values.clamp(min=0)
        order = _keys(values, indices).sort(dim=1, descending=True).indices
        values, indices = values.gather(1, order), indices.gather(1, order)
    return values, indices.to(torch.int32)


def _keys(score: Tensor, latent: Tensor) -> Tensor:
    """int64 that sorts by score (fp32, no NaN; -0.0 equals 0.0), equal ones by lower latent first."""
    bits = (score + 0.0).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) + (0x7FFFFFFF - latent)


# ------------------------------------------------------------------------------------------------------- registration


def _topk_encode_prefiltered(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, low: Tensor, bounds: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    _check(x, W_enc, b_enc, b_pre, k, selection)
    n_latents, d = W_enc.shape
    if implementation(x) == "triton" and low.shape == W_enc.shape and bounds.shape == (4, n_latents):
        sizes = PrefilterSizes.of(n_latents, k) if x.dtype == torch.float32 else None
        if sizes is None:
            return _topk_encode(x, W_enc, b_enc, b_pre, k, selection)
        entry = tuned("topk_encode_prefiltered", W_enc, x.shape[0], k)
        blocks = None if entry is None else entry.blocks
        return _topk_encode_prefiltered_triton(x, W_enc, b_enc, b_pre, low, bounds, k, selection, sizes, blocks)
    if low.shape[0] != n_latents or low.shape[1] < d + BIAS_COLUMNS or bounds.shape != (3, n_latents):
        raise ValueError(
            f"prepared is for {low.shape[0]} latents of width up to {low.shape[1] - BIAS_COLUMNS}, W_enc has shape "
            f"{tuple(W_enc.shape)}; call prepare_encoder on these weights"
        )
    if not can_prefilter(x):
        return _topk_encode(x, W_enc, b_enc, b_pre, k, selection)
    return _topk_encode_prefiltered_cpu(x, W_enc, b_enc, b_pre, low, bounds, k, selection)


def _fake(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, low: Tensor, bounds: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    return _topk_encode_fake(x, W_enc, b_enc, b_pre, k, selection)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _setup_context(ctx, (*inputs[:4], *inputs[6:]), output)


def _prefiltered_backward(ctx: Any, grad_values: Tensor, grad_indices: Tensor) -> tuple[Tensor | None, ...]:
    """As of the plain op: the bf16 copy takes no part."""
    return (*_backward(ctx, grad_values, grad_indices)[:4], None, None, None, None)


_op = torch.library.custom_op(
    "sparsefeat::topk_encode_prefiltered",
    without_autocast(_topk_encode_prefiltered),
    mutates_args=(),
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, Tensor b_pre, Tensor low, Tensor bounds, SymInt k, str selection)"
    " -> (Tensor, Tensor)",
)
_op.register_fake(_fake)
_op.register_autograd(_prefiltered_backward, setup_context=_context)


def check_current(prepared: PreparedEncoder, W_enc: Tensor, b_enc: Tensor) -> None:
    if not torch.compiler.is_compiling() and not prepared.is_current(W_enc, b_enc):
        raise ValueError(
            "prepared was made from other weights, or from these before they changed; prepare_encoder again"
        )


def topk_encode_prefiltered(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, prepared: PreparedEncoder
) -> tuple[Tensor, Tensor]:
    """`topk_encode(..., prepared=prepared)`."""
    check_current(prepared, W_enc, b_enc)
    values, indices = torch.ops.sparsefeat.topk_encode_prefiltered(
        x, W_enc, b_enc, b_pre, prepared.low, prepared.bounds, k, selection
    )
    return values, indices
