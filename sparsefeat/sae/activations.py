"""From rows to codes: top-k, batch top-k and thresholds. Rows come in normalised, `b_pre` not yet subtracted.

None of these holds `[rows, n_latents]`: top-k is the fused kernel, batch top-k searches among every row's own best,
and thresholds are the kernel that lists what is active, padded here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sparsefeat_kernels import SparseCode, matching_pursuit, threshold_encode_csr, topk_encode
from torch import Tensor

# Which selection of the kernel an activation is.
SELECTION = {"topk": "relu", "batch_topk": "relu", "signed_topk": "signed", "raw_topk": "raw"}


def batch_topk_encode(
    rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int, total: Callable[[Tensor], Tensor] | None = None
) -> SparseCode:
    """Keep the `k * rows` largest pre-activations of the whole batch, then ReLU (BatchTopK, arXiv 2412.06410).

    The width of the code is the largest number kept in one row. Every row offers its own `m` best, first `4 k`. Had a
    row all of its `m` kept, it might have had more to offer, so `m` doubles until no row does: the result is exact.
    total: sums a number over the processes that have a part of the batch each, all of which call this; then equal values at
    the edge are all kept.
    """
    n_rows, n_latents = rows.shape[0], W_enc.shape[0]
    wanted = k * n_rows if total is None else k * int(total(torch.tensor(n_rows, device=rows.device)))
    m = min(n_latents, 4 * k)
    while True:
        values, indices = topk_encode(rows, W_enc, b_enc, b_pre, m, "relu")
        invalid = values.detach().isnan().any(-1)  # a row with NaN is NaN throughout: it keeps k and takes no part
        candidates = values.detach().masked_fill(invalid.unsqueeze(-1), 0).flatten()
        if total is None:
            keep = torch.zeros_like(candidates, dtype=torch.bool)
            keep[candidates.topk(min(wanted, candidates.numel()), sorted=False).indices] = True
        else:
            keep = _largest(candidates, wanted, total)
        # A row's values are sorted, so what it keeps is its first `count`: equal values are interchangeable.
        count = (keep & (candidates > 0)).view_as(values).sum(-1).masked_fill_(invalid, k)
        width = max(1, int(count.max())) if n_rows else 1
        full = torch.tensor(int(width == m < n_latents), device=rows.device)
        if not (full if total is None else total(full)):
            kept = torch.arange(m, device=rows.device) < count.unsqueeze(-1)
            return SparseCode(values.where(kept, 0)[:, :width], indices[:, :width].contiguous(), n_latents)
        m = min(n_latents, 2 * m)


def _largest(values: Tensor, count: int, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Which of the values, none negative, are among the `count` largest over all processes, by halving where the edge is.

    Bits of floats that are not negative are in their order as integers: so many halvings as those have bits, one small sum
    each, and nothing waits for the device.
    """
    keys = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).long()
    low, high = keys.new_zeros(()), keys.new_tensor(2 ** (8 * values.element_size() - 1) - 1)
    for _ in range(8 * values.element_size() - 1):
        middle = low + (high - low + 1) // 2
        enough = total((keys >= middle).sum()) >= count
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    return keys >= low


def threshold_encode(rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor | None) -> SparseCode:
    """`relu(pre)` where `pre > threshold` (a scalar, one a latent, or None for plain ReLU).

    The width of the code is the largest number of active latents in one row, at least 1: the host waits for the device
    to learn it. Entries are sorted by value descending, then index; a row with fewer is filled with value 0. A row with
    NaN is NaN in all its values. Half precision is accumulated and returned in float32. Scratch is the kernel's and
    some copies of the active entries. Differentiable in rows, W_enc, b_enc and b_pre, not in the threshold.
    """
    floor = W_enc.new_zeros(()) if threshold is None else threshold.detach()
    values, indices, row_offsets = threshold_encode_csr(rows, W_enc, b_enc, b_pre, floor)
    counts = row_offsets.diff()
    width = max(1, int(counts.max())) if rows.shape[0] else 1
    row = torch.repeat_interleave(counts, output_size=values.shape[0])
    order = values.detach().sort(descending=True, stable=True).indices  # within a row, entries come by index
    order = order[row[order].sort(stable=True).indices]
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device) - row_offsets[row]
    padded = values.new_zeros(rows.shape[0], width).index_put((row, place), values)
    latents = indices.new_zeros(padded.shape).index_put_((row, place), indices)
    invalid = padded.detach()[:, :1].isnan()  # the only entry of such a row
    return SparseCode(padded.masked_fill(invalid, torch.nan), latents, W_enc.shape[0])


def groupmax_encode(rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int) -> SparseCode:
    """The largest pre-activation of each of k groups of neighbouring latents, then ReLU; entries in the groups' order.

    One top-1 encode a group: no more than the kernel's scratch at a time.
    """
    size = W_enc.shape[0] // k
    groups = [
        topk_encode(rows, W_enc[first : first + size], b_enc[first : first + size], b_pre, 1, "relu")
        for first in range(0, k * size, size)
    ]
    values = torch.cat([values for values, _ in groups], 1)
    indices = torch.cat([indices + group * size for group, (_, indices) in enumerate(groups)], 1)
    return SparseCode(values, indices, W_enc.shape[0])


def pursuit_encode(rows: Tensor, W_dec: Tensor, b_pre: Tensor, k: int, activation: str) -> SparseCode:
    """k greedy steps over the decoder rows, in float32 at least; an entry of value 0 is a step that was not needed."""
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    method = activation.removesuffix("_pursuit")
    values, indices = matching_pursuit((rows - b_pre).to(wide), W_dec.to(wide), k, method)
    return SparseCode(values, indices, W_dec.shape[0])


@torch.no_grad()
def nnls_encode(rows: Tensor, W_enc: Tensor, W_dec: Tensor, b_pre: Tensor) -> SparseCode:
    """argmin over u >= 0 of |relu(x - b_pre) - u P|^2 + |relu(b_pre - x) - u N|^2, of the parts P = (W_enc + W_dec) / 2 and
    N = (W_enc - W_dec) / 2; every latent has an entry, by falling value."""
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    around, total, difference = (t.to(wide) for t in (rows - b_pre, W_enc, W_dec))
    parts = torch.cat([total + difference, total - difference], 1) / 2
    signs = torch.cat([around, -around], 1).relu()
    codes = nonnegative_codes(parts @ parts.T, signs @ parts.T)
    values, indices = codes.sort(dim=1, descending=True, stable=True)
    return SparseCode(values, indices.to(torch.int32), len(W_dec))


def nonnegative_codes(
    gram: Tensor, products: Tensor, start: Tensor | None = None, sweeps: int = 500, tolerance: float = 1e-5
) -> Tensor:
    """argmin over u >= 0 of u G u^T / 2 - u b^T for every row b `[rows, n]` of `products`, by cyclic coordinate descent.

    It ends when no entry's gradient, where it could still move, exceeds `tolerance` times the largest product.
    """
    u = torch.zeros_like(products) if start is None else start.clone()
    gradient = u @ gram - products
    small = tolerance * products.abs().nan_to_num().amax() if products.numel() else products.new_zeros(())
    for _ in range(sweeps):
        for latent in range(gram.shape[0]):
            if gram[latent, latent] > 0:
                after = (u[:, latent] - gradient[:, latent] / gram[latent, latent]).clamp_min(0)
                gradient += torch.outer(after - u[:, latent], gram[latent])
                u[:, latent] = after
        can_move = torch.where(u > 0, gradient.abs(), (-gradient).clamp_min(0))
        if not (can_move.nan_to_num() > small).any():
            break
    return u
