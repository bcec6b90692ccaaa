"""What maps are made of beside an attention: sums of its rows and of what its keys receive, its maps' gradient, concepts' maps,
and maps enlarged and added up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sparsefeat_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.measure.answers import checked_rows, output_fault, torch_dtype
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.timing import DENSE, OURS, Provider


@dataclass(frozen=True)
class Case:
    """`given` as an op takes it, `into` the shape of the fp32 maps that it adds to."""

    given: tuple[Tensor, ...]
    into: tuple[int, ...]
    dtype: str

    def empty(self) -> tuple[Case, Tensor]:
        return self, torch.zeros(self.into, device=self.given[0].device)


def _normal(seed: int, device: str, dtype: str, *sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    g = torch.Generator(device).manual_seed(seed)
    return tuple(torch.randn(size, generator=g, device=device).to(torch_dtype(dtype)) for size in sizes)


def _copied(state: Any, answer: Tensor) -> Tensor:
    return answer.clone()


# ------------------------------------------------------------------------------- what rows add up to, what keys receive


def _rows_inputs(shape: Shape, dtype: str, device: str, seed: int) -> Case:
    """Query and key, and the eighth of the keys that is marked, the first ones."""
    b, h, n, t, d = (shape[name] for name in ("batch", "heads", "n", "t", "d"))
    query, key = _normal(seed, device, dtype, (b, n, h, d), (b, t, h, d))
    return Case((query.transpose(1, 2), key.transpose(1, 2), torch.arange(t, device=device) < -(-t // 8)), (), dtype)


def _our_rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    query, key, marked = case.given
    return kernels.attention_rows(query, key, marked=marked)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    return query @ key.mT * query.shape[-1] ** -0.5


def _eager_rows(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    query, key, marked = case.given
    logs = _scores(query, key).float()
    lse = logs.logsumexp(-1)
    logs -= lse[..., None]
    p = logs.exp()
    return lse, -(p * logs).sum(-1), p @ marked.to(p.dtype)


def _rows_fault(case: Case, answer: tuple[Tensor, Tensor, Tensor]) -> str:
    query, key, marked = case.given
    rows = checked_rows(query.shape[2]).to(query.device)
    scores = _scores(query[:, :, rows].double(), key.double())
    p = scores.softmax(-1)
    right = scores.logsumexp(-1), torch.special.entr(p).sum(-1), p[..., marked].sum(-1)
    found = (output_fault(a[:, :, rows], r, case.dtype) for a, r in zip(answer, right, strict=True))
    return next((fault for fault in found if fault), "")


def _rows_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_rows),
        Provider(DENSE, _eager_rows, note="eager: all probabilities in memory"),
    ]


def _rows_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 2.0 * b * h * n * t * d, size * b * h * d * (1.0 * n + t) + 12.0 * b * h * n


def _columns_inputs(shape: Shape, dtype: str, device: str, seed: int) -> Case:
    """Query, key, and the log-sum-exp of every row, which whoever asks has from the attention."""
    query, key, _ = _rows_inputs(shape, dtype, device, seed).given
    lse = torch.empty(query.shape[:3], device=device)
    for h in range(query.shape[1]):
        lse[:, h] = _scores(query[:, h].float(), key[:, h].float()).logsumexp(-1)
    return Case((query, key, lse), (shape["batch"], shape["t"]), dtype)


def _our_columns(state: tuple[Case, Tensor]) -> Tensor:
    case, sums = state
    kernels.attention_column_sums_(sums, *case.given)
    return sums


def _eager_columns(state: tuple[Case, Tensor]) -> Tensor:
    (query, key, lse), sums = state[0].given, state[1]
    sums += (_scores(query, key).float() - lse[..., None]).exp().sum((1, 2))
    return sums


def _columns_fault(case: Case, answer: Tensor) -> str:
    query, key, lse = (tensor.double() for tensor in case.given)
    keys = checked_rows(key.shape[2]).to(key.device)
    received = (_scores(query, key[:, :, keys]) - lse[..., None]).exp().sum((1, 2))
    return output_fault(answer[:, keys], received, case.dtype)


def _columns_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_columns, Case.empty, _copied),
        Provider(DENSE, _eager_columns, Case.empty, _copied, note="eager: all probabilities in memory"),
    ]


def _columns_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 2.0 * b * h * n * t * d, size * b * h * d * (1.0 * n + t) + 4.0 * b * h * n + 8.0 * b * t


# ----------------------------------------------------------------------------------------- the gradient of a map's keys


def _gradient_inputs(shape: Shape, dtype: str, device: str, seed: int) -> Case:
    b, h, n, t, d = (shape[name] for name in ("batch", "heads", "n", "t", "d"))
    query, key = _normal(seed, device, dtype, (b, h, n, d), (b, h, t, d))
    (grad,) = _normal(seed + 1, device, "float32", (b, n, t))
    return Case((query.requires_grad_(), key.requires_grad_(), grad), (b, n, t), dtype)


def _gradients(maps: Any) -> Any:
    """Of `maps(query, key)`: [batch, positions, tokens] fp32, those of the loss sum of maps times grad."""

    def run(case: Case) -> tuple[Tensor, ...]:
        query, key, grad = case.given
        return torch.autograd.grad(maps(query, key), (query, key), grad)

    return run


def _eager_map(query: Tensor, key: Tensor) -> Tensor:
    return _scores(query, key).softmax(-1).sum(1, dtype=torch.float32)


def _gradient_fault(case: Case, answer: tuple[Tensor, ...]) -> str:
    query, key, grad = (tensor.detach().double() for tensor in case.given)
    query.requires_grad_()
    key.requires_grad_()
    with torch.enable_grad():
        maps = _scores(query, key).softmax(-1).sum(1)
    right = torch.autograd.grad(maps, (query, key), grad)
    return next((f for f in (output_fault(a, r, case.dtype) for a, r in zip(answer, right, strict=True)) if f), "")


def _gradient_providers() -> list[Provider]:
    return [
        Provider(OURS, _gradients(kernels.attention_map)),
        Provider(DENSE, _gradients(_eager_map), note="eager: all probabilities are kept for the backward pass"),
    ]


def _gradient_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 8.0 * b * h * n * t * d, size * b * h * d * 3.0 * (n + t) + 8.0 * b * n * t


# ------------------------------------------------------------------------------------------------------- concepts' maps


def _concept_inputs(shape: Shape, dtype: str, device: str, seed: int) -> Case:
    b, h, n, t, d = (shape[name] for name in ("batch", "heads", "n", "t", "d"))
    output, concepts = _normal(seed, device, dtype, (b, n, h, d), (b, t, h, d))
    # A tenth: of softmax over scores of hundreds nothing is left but ones and zeros.
    return Case((output.transpose(1, 2) * 0.1, concepts.transpose(1, 2)), (b, n, t), dtype)


def _our_concepts(state: tuple[Case, Tensor]) -> Tensor:
    case, maps = state
    kernels.concept_map_(maps, *case.given)
    return maps


def _eager_concepts(state: tuple[Case, Tensor]) -> Tensor:
    case, maps = state
    output, concepts = (tensor.transpose(1, 2).flatten(2) for tensor in case.given)
    maps += (output @ concepts.mT).float().softmax(-1)
    return maps


def _concept_fault(case: Case, answer: Tensor) -> str:
    output, concepts = (tensor.double() for tensor in case.given)
    return output_fault(answer, torch.einsum("bhne,bhce->bnc", output, concepts).softmax(-1), case.dtype)


def _concept_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_concepts, Case.empty, _copied),
        Provider(DENSE, _eager_concepts, Case.empty, _copied, note="one product over heads and width"),
    ]


def _concept_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 2.0 * b * h * n * t * d, size * b * h * d * (1.0 * n + t) + 8.0 * b * n * t


# --------------------------------------------------------------------------------------------------- enlarged and added


def _resize_inputs(shape: Shape, dtype: str, device: str, seed: int) -> Case:
    """`maps` of layers and heads, of `t` tokens each, `side` x `side`, enlarged to `to` x `to`. Always fp32."""
    m, t, side, to = (shape[name] for name in ("maps", "t", "side", "to"))
    (maps,) = _normal(seed, device, "float32", (m, t, side, side))
    return Case((maps.softmax(1),), (t, to, to), "float32")


def _our_resize(state: tuple[Case, Tensor]) -> Tensor:
    case, sums = state
    kernels.resize_add_(sums, case.given[0], clamp=True)
    return sums


def _eager_resize(state: tuple[Case, Tensor]) -> Tensor:
    (maps,), sums = state[0].given, state[1]
    sums += F.interpolate(maps, size=sums.shape[-2:], mode="bicubic").clamp_(min=0).sum(0)
    return sums


def _resize_fault(case: Case, answer: Tensor) -> str:
    large = F.interpolate(case.given[0].double(), size=answer.shape[-2:], mode="bicubic").clamp(min=0)
    return output_fault(answer, large.sum(0), case.dtype)


def _resize_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_resize, Case.empty, _copied),
        Provider(
            DENSE, _eager_resize, Case.empty, _copied, note="interpolate, clamp, sum: all enlarged maps in memory"
        ),
    ]


def _resize_cost(s: Shape, size: int) -> tuple[float, float]:
    m, t, side, to = (s[name] for name in ("maps", "t", "side", "to"))
    return 40.0 * m * t * to * to, 4.0 * m * t * side * side + 8.0 * t * to * to


OPS = {
    "attention_rows": Op(_rows_providers, _rows_fault, _rows_cost, _rows_inputs),
    "attention_column_sums": Op(_columns_providers, _columns_fault, _columns_cost, _columns_inputs),
    "attention_map_gradient": Op(
        _gradient_providers, _gradient_fault, _gradient_cost, _gradient_inputs, gradients=True
    ),
    "concept_map": Op(_concept_providers, _concept_fault, _concept_cost, _concept_inputs),
    "resize_add": Op(_resize_providers, _resize_fault, _resize_cost, _resize_inputs),
}
