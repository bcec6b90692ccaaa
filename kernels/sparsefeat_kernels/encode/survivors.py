"""Which latents can be among a row's k largest: told by a bf16 product and its bound, the others are never computed.

A processor with bf16 matrix instructions multiplies bf16 three to five times as fast as fp32. So the whole product is
made in bf16, a rigorous bound (rounded.py) tells which latents can be among a row's k largest, and only those are computed
in fp32. The weights in bf16 are prepared once, or rounded a tile of latents at a time for every chunk of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..dispatch import row_chunks
from ..threads import Task, conducted, each, shares, threads, together
from .cpu import PREACTIVATION_BYTES, topk_encode_cpu
from .keys import entry_keys, ordered_bits, relu_in_order
from .rounded import SMALLEST_PRODUCT, RoundedEncoder, RoundedRows, round_encoder, rounded_width

__all__ = [
    "CANDIDATES",
    "GROUPS",
    "PAIRS",
    "cuts",
    "entries_that_reach",
    "group_bounds",
    "group_maxima",
    "most_groups",
    "positive_maxima",
    "rounded_group",
    "survivors_of",
    "topk_of_rounded",
    "topk_prefiltered_cpu",
]

GROUPS_A_K = 8  # at least so many groups for each of the k: fewer, and two of the k often share a group
GROUPS = (16, 8, 4)  # latents a group, of which one maximum is looked at first
# A row with more groups left is computed plainly: 8 for each of the k; for few k 128, or a quarter of all.
SURVIVING_GROUPS = (8, 128)
COARSER = 4  # groups of which the best lower bound counts, where that leaves enough: a quarter to search, hardly lower
CANDIDATES = 1 << 20  # entries of surviving groups looked at together: 16 MiB of scratch at worst
# Multiplications below which prepared weights are passed over: a row at 768 x 3,072 takes 2.2 ms of a processor through the
# phases of the prefilter and 0.9 plainly, 77 rows 4.5 and 5.9 (two threads, AMD EPYC).
PREFILTERED_PRODUCT = 1 << 24
CENTRED_BYTES = 6 << 20  # fp32 rows whose survivors are rescored together: 1,200 of width 1,280
PAIRS = 1 << 17  # survivors rescored together, 60 bytes each


def rounded_group(n_latents: int, k: int) -> int | None:
    """Latents a group, or None where the plain path is the better one."""
    fitting = (g for g in GROUPS if n_latents % g == 0 and n_latents // g >= GROUPS_A_K * k)
    return next(fitting, None)


def most_groups(n_groups: int, k: int) -> int:
    """Groups that may be left in a row that is proved."""
    a_k, few = SURVIVING_GROUPS
    return min(n_groups, max(a_k * k, min(few, n_groups // 4)))


@conducted
def topk_prefiltered_cpu(
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
    n_latents, width, group = W_enc.shape[0], rounded_width(d), rounded_group(W_enc.shape[0], k)
    least = SMALLEST_PRODUCT if low is None else PREFILTERED_PRODUCT
    if group is None or not W_enc.is_contiguous() or rows * width * n_latents < least:
        return topk_encode_cpu(x, W_enc, b_enc, b_pre, k, selection)
    if low is None or bounds is None:
        encoder = round_encoder(W_enc, b_enc, rows)
    else:
        largest = float(bounds[0].max()), float(b_enc.abs().max())
        encoder = RoundedEncoder(W_enc, None, low, bounds, largest)
    return topk_of_rounded(x, encoder, b_enc, b_pre, k, selection, group)


@dataclass
class _Found:
    """The survivors of some rows of a call, once they are found: pairs of a row, counted from rows.start, and a latent."""

    rows: slice
    row: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    latent: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


@dataclass(frozen=True, eq=False)
class _Search:
    """What the phases of one call share, and what they leave."""

    encoder: RoundedEncoder
    bias: Tensor  # fp32 [n_latents]
    k: int
    selection: str
    group: int
    values: Tensor  # [rows, k]
    indices: Tensor  # [rows, k]
    proved: Tensor  # [rows] bool

    def survivors(self, chunk: slice, part: RoundedRows, p: Tensor) -> tuple[list[_Found], list[Task]]:
        """Of the rows of a chunk: they are there when the tasks are done."""
        # Groups are strided: latents that are trained together (the first of a Matryoshka dictionary) fall into
        # different ones, and the maximum over a group is an elementwise one of long vectors.
        bounds = group_bounds(self.encoder.bounds, self.group)
        most = most_groups(p.shape[1] // self.group, self.k) * self.group
        block = max(1, CANDIDATES // threads() // most)
        found = [
            _Found(slice(chunk.start + first, chunk.start + min(first + block, share.stop)))
            for share in shares(len(p), threads())
            for first in range(share.start, share.stop, block)
        ]

        def search(one: _Found) -> None:
            some = slice(one.rows.start - chunk.start, one.rows.stop - chunk.start)
            of_block = p[some].abs_() if self.selection == "signed" else p[some]  # nobody reads p after this
            one.row, one.latent, proved = survivors_of(of_block, part.part(some), bounds, self.k)
            self.proved[one.rows] = proved

        return found, each(search, found)

    def rescore(self, found: list[_Found], centred: Tensor, first_row: int) -> None:
        """The codes of the rows of `found`, whose pairs are computed in fp32. centred [rows, d]: from first_row on."""
        row = torch.cat([one.row + (one.rows.start - first_row) for one in found])
        latent = torch.cat([one.latent for one in found])
        a = torch.empty(len(row), dtype=torch.float32)
        together(self.encoder.rescoring(centred, row, latent, a))
        parts = a.add_(self.bias.index_select(0, latent)).split([len(one.row) for one in found])

        def finish(piece: tuple[_Found, Tensor]) -> None:
            one, of_one = piece
            count = one.rows.stop - one.rows.start
            code = _largest_of_each_row(of_one, one.row, one.latent, count, self.k, self.selection)
            self.values[one.rows], self.indices[one.rows] = code

        together(each(finish, zip(found, parts, strict=True)))


@conducted
def topk_of_rounded(
    x: Tensor, encoder: RoundedEncoder, b_enc: Tensor, b_pre: Tensor, k: int, selection: str, group: int
) -> tuple[Tensor, Tensor]:
    """topk_encode through an encoder of W_enc and b_enc; `group` of `rounded_group`.

    A chunk of rows is two phases of the threads: the product, by latents; its survivors, by rows. Several chunks are
    rounded together before, and the survivors of all of them are rescored together, by latents: W_enc is read once.
    """
    rows, d = x.shape
    values = torch.empty(rows, k, dtype=torch.float32)
    indices = torch.empty(rows, k, dtype=torch.int32)
    proved = torch.zeros(rows, dtype=torch.bool)
    search = _Search(encoder, b_enc.float(), k, selection, group, values, indices, proved)
    n_latents = len(encoder.W_enc)
    room = torch.empty(0, dtype=torch.float32)
    for batch in row_chunks(rows, 4 * d, CENTRED_BYTES):
        part = encoder.room_for(batch.stop - batch.start)
        together(encoder.rounding(x[batch], b_pre, part))
        chunks = row_chunks(batch.stop - batch.start, 2 * n_latents, PREACTIVATION_BYTES)
        if not len(room):
            room = torch.empty(chunks[0].stop, n_latents, dtype=torch.bfloat16)
        found: list[_Found] = []
        for chunk in chunks:
            here, p = part.part(chunk), room[: chunk.stop - chunk.start]
            together(encoder.product(here, p))
            more, tasks = search.survivors(slice(batch.start + chunk.start, batch.start + chunk.stop), here, p)
            together(tasks)
            found += more
            seen = batch.start + chunk.stop
            hopeless = 2 * int(proved[:seen].sum()) < seen  # such rows as cannot be proved: no more of this
            if hopeless or chunk is chunks[-1] or sum(len(one.row) for one in found) >= PAIRS:
                search.rescore(found, part.centred, batch.start)
                found = []
            if hopeless:
                break
        if hopeless:
            break
    left = (~proved).nonzero()[:, 0]
    if len(left):
        values[left], indices[left] = topk_encode_cpu(x[left], encoder.W_enc, b_enc, b_pre, k, selection)
    return values, indices


def survivors_of(p: Tensor, rows: RoundedRows, bounds: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(row, latent) of every entry of the product p, or of its magnitudes, that may be among its row's k largest, rows
    ascending; and [rows] whether that could be told. Of the other rows nothing is returned.

    The k-th largest of the groups' lower bounds is below at least k entries' values. Whatever has its upper bound below
    that cannot be among the k largest.
    """
    n_groups = bounds.shape[1]
    grouped = p.view(len(p), -1, n_groups)
    coarser = COARSER if n_groups % COARSER == 0 and n_groups >= COARSER * GROUPS_A_K * k else 1
    coarse_bounds = group_bounds(bounds, coarser)

    # Where every cut is positive, as in most blocks, nobody asks for a group without a positive entry.
    for maxima in (positive_maxima, group_maxima):
        top = maxima(grouped)
        best = maxima(top.view(len(p), coarser, -1)).float()
        lower = best.sub(best.abs(), alpha=2.0**-8).sub_(_margins(rows, coarse_bounds))
        cut = cuts(_kth_largest(lower, k), rows, bounds)
        if float(cut.amin()) > 0:
            break
    row, of_group = (top >= cut).nonzero(as_tuple=True)
    proved = rows.provable & (torch.bincount(row, minlength=len(p)) <= most_groups(n_groups, k))
    if not bool(proved.all()):
        kept = proved[row]
        row, of_group = row[kept], of_group[kept]
    return *entries_that_reach(cut, p, row, of_group), proved


def group_maxima(grouped: Tensor) -> Tensor:
    """`grouped.amax(1)` of bf16 [rows, group, n_groups], without NaN; -0.0 is as good as 0.0.

    The bits of floats that are not negative are ordered as integers are, those of negative ones the other way round. Integers
    are compared in a quarter of the time: a processor compares a cache line of them at once.
    """
    top = positive_maxima(grouped).view(torch.int16)
    negative = top < 0
    if bool(negative.any()):
        top = torch.where(negative, grouped.view(torch.int16).amin(1), top)
    return top.view(torch.bfloat16)


def positive_maxima(grouped: Tensor) -> Tensor:
    """`group_maxima` where a group has a positive entry; of others any of its entries."""
    return grouped.view(torch.int16).amax(1).view(torch.bfloat16)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    """Of every row. By their bits: torch compares floats, with a look for NaN, in half as much time again."""
    top = ordered_bits(values).topk(k, dim=1, sorted=False).values.amin(1)
    return ordered_bits(top.view(torch.float32)).view(torch.float32)


def group_bounds(bounds: Tensor, group: int) -> Tensor:
    """The largest bounds of every group, [3, n_groups], of those [3, n_latents] of latents or of smaller groups."""
    return bounds.view(3, group, -1).amax(1)


def _margins(rows: RoundedRows, bounds: Tensor, times: float = 1.0) -> Tensor:
    """How far the entries of every group can be from what the product says, but for its own rounding, [rows, n_groups]."""
    of_x, of_weights, others = bounds * times
    return torch.outer(rows.lost, of_x).addr_(rows.size, of_weights).add_(others)


def cuts(threshold: Tensor, rows: RoundedRows, bounds: Tensor) -> Tensor:
    """What the product must say of an entry, at the least, for the entry to reach its row's threshold, [rows, n_groups].

    An entry a can when a + 2^-8 |a| >= least, which is a number for the whole group: when a is least / (1 +- 2^-8).
    """
    slack = 2.0**-20  # of fp32's rounding here; that of the bounds has room for itself
    positive, negative = 1 / (1 + 2.0**-8) - slack, 1 / (1 - 2.0**-8) + slack
    least = _margins(rows, bounds, positive)
    torch.sub(threshold[:, None] * positive, least, out=least)
    return torch.nn.functional.leaky_relu_(least, negative / positive)


def entries_that_reach(cut: Tensor, p: Tensor, row: Tensor, of_group: Tensor) -> tuple[Tensor, Tensor]:
    """(row, latent), rows ascending, of the entries of these groups, `of_group` of `row`, that reach their group's `cut`."""
    n_groups = cut.shape[1]
    a = p.view(len(p), -1, n_groups).transpose(1, 2)[row, of_group]  # [groups, group]
    # Of vectors as long as these, index_select takes a third of the time of an index.
    least = cut.view(-1).index_select(0, row * n_groups + of_group)
    place = (a.float() >= least[:, None]).view(-1).nonzero()[:, 0]
    at, slot = place // a.shape[1], place % a.shape[1]
    return row.index_select(0, at), of_group.index_select(0, at) + slot * n_groups


def _largest_of_each_row(
    a: Tensor, row: Tensor, latent: Tensor, rows: int, k: int, selection: str
) -> tuple[Tensor, Tensor]:
    """The k largest entries of every row, sorted, equal ones by latent, as topk_encode gives them. A row without
    entries holds whatever: the caller fills it."""
    score = a.abs() if selection == "signed" else a
    keys = entry_keys(score, latent)
    counts = torch.bincount(row, minlength=rows)
    longest = max(int(counts.max()), k) if len(row) else k
    first = torch.arange(rows) * longest - (counts.cumsum(0) - counts)
    place = first.index_select(0, row).add_(torch.arange(len(row)))
    table = torch.full((rows, longest), torch.iinfo(torch.int64).min)
    table.view(-1).scatter_(0, place, keys)
    value_of = torch.zeros(rows, longest, dtype=torch.float32)
    value_of.view(-1).scatter_(0, place, a)
    top, where = table.topk(k, dim=1)
    values, indices = value_of.gather(1, where), 0x7FFFFFFF - (top & 0x7FFFFFFF)
    if selection == "relu" and bool((values[:, -1] <= 0).any()):
        values, indices = relu_in_order(values, indices)
    return values, indices.to(torch.int32)
