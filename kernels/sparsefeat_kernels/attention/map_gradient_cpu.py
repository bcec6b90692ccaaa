"""attention_map and its gradient on a CPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..dispatch import implementation, ops, sum_dtype, watched
from ..threads import conducted, each, together
from .scores import additive, head_weights, score_blocks, softmax_of

__all__ = ["gradient_cpu", "keeping", "keeps"]

# Of probabilities, up to which a graph keeps them: 8 heads of 160, 256 positions, 77 tokens are 0.6 MiB, and to make them
# again is a third of the time.
KEPT_BYTES = 4 << 20


def keeps(query: Tensor, key: Tensor) -> bool:
    """Whether plain torch makes the maps and their gradient."""
    graph = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    if not graph or query.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    here = implementation("attention_map", query) == "torch" and query.dim() == key.dim() == 4 and key.shape[2] > 0
    return here and query.shape[:3].numel() * key.shape[2] * sum_dtype(query).itemsize <= KEPT_BYTES


def keeping(query: Tensor, key: Tensor, scale: float, head_weight: Tensor | None, tokens: Tensor | None) -> Tensor:
    wide, shared = sum_dtype(query), query.shape[1] // key.shape[1]
    keys = key.to(wide) * scale
    keys = keys if shared == 1 else keys.repeat_interleave(shared, 1)
    p = torch.softmax(query.to(wide) @ keys.mT, -1)
    if not watched() and type(p) is Tensor and math.isnan(p.detach()[..., 0].sum()):
        # Of rows whose scores are all -inf, perhaps, of which the op makes 0.
        return ops.attention_map(query, key, scale, None, head_weight, tokens)
    summed = p.sum(1) if head_weight is None else torch.einsum("bhnt,h->bnt", p, head_weight.to(wide))
    if tokens is None:
        return summed
    owned = (tokens >= 0) & (tokens < key.shape[2])
    return torch.where(owned, summed[..., torch.where(owned, tokens, 0)], 0)


@conducted
def gradient_cpu(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    head_weight: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    bias, weight = additive(mask, query, key), head_weights(head_weight, query)
    (batch, heads, *_), key_heads = query.shape, key.shape[1]
    dtype, shared = sum_dtype(query), heads // key_heads
    grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
    grad_key = torch.zeros(key.shape, dtype=dtype, device=key.device)
    finite = (lambda tensor: tensor) if mask is None else _finite

    def some(which: tuple[int, int]) -> None:
        """A key's head and the query heads that read it: nobody else writes to these."""
        b, key_head = which
        mine = slice(key_head * shared, (key_head + 1) * shared)
        k = key[b, key_head : key_head + 1]
        for block, rows, scores in score_blocks(query[b, mine], k, scale, None if bias is None else bias[b, mine]):
            p = softmax_of(scores, torch.empty_like(scores))
            g = grad[b, rows].to(dtype)
            if slots is not None:
                g = torch.where(slots >= 0, g[:, slots.clamp(min=0)], 0)
            of = slice(mine.start + block.start, mine.start + block.stop)
            d_scores = torch._softmax_backward_data(
                g * (weight[of, None, None] * scale), p, -1, dtype
            )  # [heads, rows, t]
            grad_query[b, of, rows] = torch.matmul(d_scores, finite(k[0].to(dtype)))
            q = finite(query[b, of, rows].to(dtype))
            grad_key[b, key_head] += torch.matmul(d_scores.mT, q).sum(0)

    together(each(some, [(b, h) for b in range(batch) for h in range(key_heads)]))
    return grad_query.to(query.dtype), grad_key.to(key.dtype)


def _finite(tensor: Tensor) -> Tensor:
    """With 0 for NaN and infinities: what is masked has probability 0, and 0 times them is NaN. What is not masked has
    broken its row's probabilities already."""
    return torch.where(tensor.isfinite(), tensor, 0)
