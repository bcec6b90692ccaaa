"""From rows to codes: top-k, batch top-k and thresholds. Rows come in normalised, `b_pre` not yet subtracted.

None of these holds `[rows, n_latents]`: top-k is the fused kernel, batch top-k searches among every row's own best,
and thresholds go through the rows in chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from sparsefeat_kernels import SparseCode, topk_encode
from torch import Tensor

# Which selection of the kernel an activation is.
SELECTION = {"topk": "relu", "batch_topk": "relu", "signed_topk": "signed", "raw_topk": "raw"}

SCRATCH_BYTES = 64 * 2**20  # what a threshold encode may hold beside its input and output


def batch_topk_encode(rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, k: int) -> SparseCode:
    """Keep the `k * rows` largest pre-activations of the whole batch, then ReLU (BatchTopK, arXiv 2412.06410).

    The width of the code is the largest number kept in one row. Every row offers its own `m` best, first `4 k`. Had a
    row all of its `m` kept, it might have had more to offer, so `m` doubles until no row does: the result is exact.
    """
    n_rows, n_latents = rows.shape[0], W_enc.shape[0]
    m = min(n_latents, 4 * k)
    while True:
        values, indices = topk_encode(rows, W_enc, b_enc, b_pre, m, "relu")
        invalid = values.detach().isnan().any(-1)  # a row with NaN is NaN throughout: it keeps k and takes no part
        candidates = values.detach().masked_fill(invalid.unsqueeze(-1), 0).flatten()
        keep = torch.zeros_like(candidates, dtype=torch.bool)
        keep[candidates.topk(min(k * n_rows, candidates.numel()), sorted=False).indices] = True
        # A row's values are sorted, so what it keeps is its first `count`: equal values are interchangeable.
        count = (keep & (candidates > 0)).view_as(values).sum(-1).masked_fill_(invalid, k)
        width = max(1, int(count.max())) if n_rows else 1
        if width < m or m == n_latents:
            kept = torch.arange(m, device=rows.device) < count.unsqueeze(-1)
            return SparseCode(values.where(kept, 0)[:, :width], indices[:, :width].contiguous(), n_latents)
        m = min(n_latents, 2 * m)


def threshold_encode(rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, threshold: Tensor | None) -> SparseCode:
    """`relu(pre)` where `pre > threshold` (a scalar, one a latent, or None for plain ReLU).

    The width of the code is the largest number of active latents in one row, at least 1. Entries are sorted by value
    descending, then index; a row with fewer is filled with value 0. A row with NaN is NaN in all its values. Half
    precision is accumulated and returned in float32. Scratch is at most `SCRATCH_BYTES`, but never less than one row.
    Differentiable in rows, W_enc, b_enc and b_pre, not in the threshold.
    """
    floor = W_enc.new_zeros((), dtype=_accumulator(rows)) if threshold is None else threshold.clamp_min(0)
    values, indices = _ThresholdEncode.apply(rows, W_enc, b_enc, b_pre, floor.to(_accumulator(rows)))
    return SparseCode(values, indices, W_enc.shape[0])


class _ThresholdEncode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, floor: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype, n_latents = _accumulator(rows), W_enc.shape[0]
        parts: list[tuple[Tensor, Tensor]] = []
        for chunk in rows.split(_rows_per_chunk(n_latents, dtype)) if len(rows) else ():
            pre = _pre_activation(chunk, W_enc, b_enc, b_pre, dtype)  # [chunk, n_latents]
            pre.masked_fill_(pre <= floor, 0)
            width = max(1, int((pre > 0).sum(-1).max()))
            values, indices = pre.topk(width, sorted=False)
            indices, order = indices.sort(-1)
            values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
            values.masked_fill_(chunk.isnan().any(-1, keepdim=True), float("nan"))
            parts.append((values, indices.gather(-1, order).int()))
        width = max((values.shape[1] for values, _ in parts), default=1)
        values = rows.new_zeros((rows.shape[0], width), dtype=dtype)
        indices = torch.zeros_like(values, dtype=torch.int32)
        start = 0
        for part_values, part_indices in parts:
            stop = start + part_values.shape[0]
            values[start:stop, : part_values.shape[1]] = part_values
            indices[start:stop, : part_values.shape[1]] = part_indices
            start = stop
        ctx.save_for_backward(rows, W_enc, b_pre, values, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx: Any, grad_values: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        rows, W_enc, b_pre, values, indices = ctx.saved_tensors
        dtype, n_latents = values.dtype, W_enc.shape[0]
        grad_rows = torch.empty_like(rows, dtype=dtype)
        grad_W_enc = torch.zeros_like(W_enc, dtype=dtype)
        grad_b_enc = grad_W_enc.new_zeros(n_latents)
        active = grad_values.where(values > 0, 0)
        step, start = _rows_per_chunk(n_latents, dtype), 0
        for chunk in rows.split(step):
            part = slice(start, start + chunk.shape[0])
            dense = active.new_zeros((chunk.shape[0], n_latents))
            dense.scatter_add_(1, indices[part].long(), active[part])
            grad_rows[part] = dense @ W_enc.to(dtype)
            grad_W_enc.addmm_(dense.T, chunk.to(dtype) - b_pre.to(dtype))
            grad_b_enc += dense.sum(0)
            start += chunk.shape[0]
        return (
            grad_rows.to(rows.dtype),
            grad_W_enc.to(W_enc.dtype),
            grad_b_enc.to(W_enc.dtype),
            -grad_rows.sum(0).to(b_pre.dtype),
            None,
        )


def _accumulator(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _rows_per_chunk(n_latents: int, dtype: torch.dtype) -> int:
    # A row holds pre-activations, a mask, and at worst (all active) values, indices and sorting order of its own.
    row_bytes = n_latents * (3 * dtype.itemsize + 3 * 8 + 1)
    return max(1, SCRATCH_BYTES // 2 // row_bytes)


def _pre_activation(rows: Tensor, W_enc: Tensor, b_enc: Tensor, b_pre: Tensor, dtype: torch.dtype) -> Tensor:
    """`[rows, n_latents]` in dtype; weights of another dtype are widened a tile of latents at a time."""
    n_latents, d_model = W_enc.shape
    centred = rows.to(dtype) - b_pre.to(dtype)
    if W_enc.dtype == dtype:
        return torch.addmm(b_enc, centred, W_enc.T)
    pre = centred.new_empty((rows.shape[0], n_latents))
    tile = max(1, SCRATCH_BYTES // 4 // (d_model * dtype.itemsize))
    for start in range(0, n_latents, tile):
        part = slice(start, start + tile)
        pre[:, part] = torch.addmm(b_enc[part].to(dtype), centred, W_enc[part].to(dtype).T)
    return pre
