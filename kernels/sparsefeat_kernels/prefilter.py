"""topk_encode through a bf16 product: the exact answer where a bound proves it, the plain path where it does not.

A processor with bf16 matrix instructions multiplies bf16 three to four times as fast as fp32. So the whole product is
made in bf16, a rigorous bound tells which latents can be among a row's k largest, and only those are computed in fp32.

With x' = x - b_pre, ~ for rounding to bf16, |.| for 2-norms, u = 2^-24, and p the product as bf16 stores it:

    |p - (x'.w + b)|  <=  |x' - x'~| |w|  +  |x'~| |w - w~|  +  2^-8 |p|              operands, result
                          +  (d + 8) u (|x'~| |w~| + |b|)                                 accumulation in fp32
                          +  2^-126 (sqrt(d) (|x'~| + |w~|) + 2 d + 1)                    denormals that were flushed

with |w - w~| <= 2^-9 |w| + 2^-134 sqrt(d) for the rounding of a weight. b_enc takes part in the product, as three more
columns (a float is the sum of three bf16), so that no pass over the [rows, n_latents] tensor adds it. Norms are fp32
sums, rounded up by what such a sum can have lost: (d + 8) u of it, and 2^-63 sqrt(d) where squares underflow.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .dispatch import implementation
from .pair_products import pair_products
from .topk_encode import (
    PREACTIVATION_BYTES,
    _backward,
    _check,
    _setup_context,
    _topk_encode,
    _topk_encode_cpu,
    _topk_encode_fake,
)

__all__ = ["PreparedEncoder", "bf16_products", "prepare_encoder", "topk_encode_prefiltered"]

GROUPS = (16, 8, 4)  # latents a group, of which one maximum is looked at first
GROUPS_A_K = 8  # at least so many groups for each of the k: fewer, and two of the k often share a group
SURVIVING_GROUPS = 8  # a row with more than so many groups a k left is computed plainly
CANDIDATES = 1 << 19  # entries of surviving groups looked at together: 20 MiB of scratch at worst
BIAS_COLUMNS = 3
ALIGNMENT = 32  # bf16 columns: a cache line
SMALLEST_PRODUCT = 1 << 16  # multiplications; torch makes smaller products by itself, summed as it likes
LARGEST = 1e38  # of |x'| |w| + |b|: beyond, a partial sum may overflow


@dataclass(frozen=True, eq=False)
class PreparedEncoder:
    """What `topk_encode(..., prepared=)` keeps of an encoder between calls: 2 n_latents (d + 3, rounded up to 32) bytes
    of bf16 weights and 12 n_latents bytes of norms; half the size of fp32 weights. Made by `prepare_encoder`."""

    low: Tensor  # bf16 [n_latents, width]: W_enc, b_enc in three parts, zeros
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

    One pass over the weights: at 20,480 x 1280 about a tenth of what the product with 256 rows takes when memory is used
    again (`into`), a quarter when it is new (8 and 24 ms beside 90 on two cores of an AMD EPYC).

    Args:
        W_enc [n_latents, d], b_enc [n_latents]: float32 on the CPU.
        into: an earlier one of the same shape, whose memory is used again; it must not be used any more.

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
    n_latents, d = W_enc.shape
    width = -(-(d + BIAS_COLUMNS) // ALIGNMENT) * ALIGNMENT
    if into is not None and into.low.shape == (n_latents, width):
        low, bounds = into.low, into.bounds
    else:
        low, bounds = torch.zeros(n_latents, width, dtype=torch.bfloat16), torch.empty(3, n_latents)
    rest = b_enc.detach().clone()
    for column in range(d, d + BIAS_COLUMNS):
        low[:, column] = rest
        rest -= low[:, column].float()  # exact: what rounding left
    low[:, :d] = W_enc.detach()
    norm = _norm_rounded_up(W_enc.detach()).double()
    accumulation, denormal, root = (width + 8) * 2.0**-24, 2.0**-126, d**0.5
    kept = (1 + 2.0**-9) * norm + 2.0**-134 * root
    lost = 2.0**-9 * norm + 2.0**-134 * root
    from_bias = rest.double().abs() + accumulation * 1.01 * b_enc.detach().double().abs()
    bounds[0] = _rounded_up(norm)
    bounds[1] = _rounded_up(lost + accumulation * kept + denormal * root)
    bounds[2] = _rounded_up(from_bias + denormal * (root * kept + 2 * width + 1))
    versions = W_enc._version, b_enc._version
    return PreparedEncoder(low, bounds, (weakref.ref(W_enc), weakref.ref(b_enc)), versions)


def _rounded_up(x: Tensor) -> Tensor:
    """fp64 to fp32, never less than it was, with room for the rounding of what it is multiplied and added with."""
    return (x * (1 + 1e-5) + 2.0**-126).float()


def _norm_rounded_up(x: Tensor) -> Tensor:
    """fp32 norms of the rows of x [rows, d], never less than the true ones."""
    d = x.shape[1]
    return torch.linalg.vector_norm(x, dim=1) * (1 + (d + 8) * 2.0**-24 + 1e-6) + 2.0**-63 * d**0.5


@functools.cache
def bf16_products() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware, with sums in fp32."""
    if not torch.backends.mkldnn.is_available():
        return False
    asked = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is not None and ask() for ask in asked)


def can_prefilter(x: Tensor) -> bool:
    """Whether rows like these go through the prefilter."""
    on_cpu = x.dtype == torch.float32 and x.device.type == "cpu" and implementation(x) == "cpu"
    return on_cpu and bf16_products() and getattr(torch.backends.mkldnn, "enabled", True)


def _group(n_latents: int, k: int) -> int | None:
    """Latents a group, or None where the plain path is the better one."""
    fitting = (g for g in GROUPS if n_latents % g == 0 and n_latents // g >= GROUPS_A_K * k)
    return next(fitting, None)


def _topk_encode_prefiltered_cpu(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, low: Tensor, bounds: Tensor, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    rows, d = x.shape
    n_latents, width, group = W_enc.shape[0], low.shape[1], _group(W_enc.shape[0], k)
    if group is None or not W_enc.is_contiguous() or rows * width * n_latents < SMALLEST_PRODUCT:
        return _topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection)
    n_groups = n_latents // group
    # Groups are strided: latents that are trained together (the first of a Matryoshka dictionary) fall into different
    # ones, and the maximum over a group is an elementwise one of long vectors.
    by_group = bounds.view(3, group, n_groups)
    group_bounds = by_group.amax(1)  # [3, n_groups]
    entry_bounds = by_group.permute(2, 0, 1).contiguous()  # [n_groups, 3, group]
    largest_w, largest_b = float(bounds[0].max()), float(b_enc.abs().max())
    values = x.new_empty(rows, k)
    indices = x.new_empty(rows, k, dtype=torch.int32)
    chunk = max(1, min(rows, PREACTIVATION_BYTES // (2 * (n_latents + width) + 12 * d)))
    chunk = -(-rows // -(-rows // chunk))
    product = x.new_empty(chunk, n_latents, dtype=torch.bfloat16)
    rounded = torch.zeros(chunk, width, dtype=torch.bfloat16)
    rounded[:, d : d + BIAS_COLUMNS] = 1
    unproved = []
    for start in range(0, rows, chunk):
        centred = x[start : start + chunk] - b_pre
        count = len(centred)
        rounded[:count, :d] = centred
        p = torch.mm(rounded[:count], low.T, out=product[:count])
        kept = rounded[:count, :d].float()
        size, lost = _norm_rounded_up(kept), _norm_rounded_up(centred - kept)
        provable = size * largest_w + largest_b < LARGEST  # not so for NaN either
        block = max(1, CANDIDATES // (min(n_groups, SURVIVING_GROUPS * k) * group))
        for first in range(0, count, block):
            part = slice(first, min(first + block, count))
            found = _survivors(
                p[part], size[part], lost[part], provable[part], group_bounds, entry_bounds, k, selection == "signed"
            )
            row, latent, proved = found
            out = slice(start + part.start, start + part.stop)
            a = _products(centred[part], W_enc, row, latent) + b_enc[latent]
            values[out], indices[out] = _largest_of_each_row(a, row, latent, part.stop - part.start, k, selection)
            unproved.append((~proved).nonzero()[:, 0] + out.start)
    left = torch.cat(unproved)
    if len(left):
        values[left], indices[left] = _topk_encode_cpu(x[left], W_enc, b_enc, b_pre, k, selection)
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
    margin = torch.outer(lost, group_bounds[0]).addr_(size, group_bounds[1]).add_(group_bounds[2])
    margin.add_(top.abs(), alpha=2.0**-8)
    threshold = (top - margin).topk(k, dim=1, sorted=False).values.amin(1)
    alive = (top + margin) >= threshold[:, None]
    proved = provable & (alive.sum(1) <= SURVIVING_GROUPS * k)
    alive &= proved[:, None]
    row, of_group = alive.nonzero(as_tuple=True)
    slots = torch.arange(group) * n_groups
    latent = of_group[:, None] + slots  # [groups alive, group]
    a = p.reshape(-1).take(row[:, None] * (group * n_groups) + latent).float()
    bound = entry_bounds.index_select(0, of_group)  # [groups alive, 3, group]
    upper = (a.abs() if signed else a) + a.abs() * 2.0**-8
    upper += lost[row, None] * bound[:, 0] + size[row, None] * bound[:, 1] + bound[:, 2]
    of_alive, slot = (upper >= threshold[row, None]).nonzero(as_tuple=True)
    return row[of_alive], latent[of_alive, slot], proved


def _products(x: Tensor, W: Tensor, row: Tensor, latent: Tensor) -> Tensor:
    """x[row] . W[latent] of every pair, rows ascending."""
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=len(x)), 0, out=offsets[1:])
    return pair_products(x, W, offsets, latent)


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
    _topk_encode_prefiltered,
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
