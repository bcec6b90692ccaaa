"""F.linear, torch.topk and F.embedding_bag: the shortest sparse way in PyTorch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.measure.sae_case import AUXK, SAECase
from sparsefeat.measure.timing import Provider

NAME = "linear + topk + embedding_bag"
PACKAGE = None


def why_absent() -> str:
    return ""


def encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = F.linear(x - b, W_enc, b_enc).topk(k, sorted=False)
    return values.relu(), indices


def decode(values: Tensor, indices: Tensor, W_dec: Tensor, b: Tensor) -> Tensor:
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum") + b


def forward(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int) -> Tensor:
    return decode(*encode(x, W_enc, b_enc, b, k), W_dec, b)


def loss(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int, is_dead: Tensor, n_dead: int
) -> Tensor:
    """The loss of sparsefeat.training.objective.objectives; `n_dead` is given, since counting would break a compiled graph."""
    a = F.linear(x - b, W_enc, b_enc)
    values, indices = a.topk(k, sorted=False)
    error = x - decode(values.relu(), indices, W_dec, b)
    variance = (x - x.mean(0)).square().sum()
    wanted = x.shape[1] // 2
    values, indices = torch.where(is_dead, a, -torch.inf).topk(min(wanted, n_dead), sorted=False)
    guess = F.embedding_bag(indices, W_dec, per_sample_weights=values.relu(), mode="sum")
    missed = (guess - error.detach()).square().sum()
    return (error.square().sum() + AUXK * min(n_dead / wanted, 1.0) * missed) / variance


def weights(case: SAECase) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in (case.W_enc, case.b_enc, case.W_dec, case.b)]


def step(state: Any, loss: Any = loss) -> dict[str, Tensor]:
    case, parameters = state
    total = loss(case.x, *parameters, case.k, case.is_dead, len(case.dead))
    gradients = torch.autograd.grad(total, parameters)
    return {"loss": total.detach(), **dict(zip(("W_enc", "b_enc", "W_dec"), gradients[:3], strict=True))}


def code_to_decode(case: SAECase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return case.values.to(case.W_dec.dtype), case.indices.long(), case.W_dec, case.b


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return {
        "topk_encode": [Provider(NAME, lambda c: encode(c.x, c.W_enc, c.b_enc, c.b, c.k))],
        "sparse_decode": [Provider(NAME, lambda state: decode(*state), code_to_decode)],
        "forward": [Provider(NAME, lambda c: forward(c.x, c.W_enc, c.b_enc, c.W_dec, c.b, c.k))],
        "training_step": [Provider(NAME, step, lambda case: (case, weights(case)))],
    }.get(op, [])
