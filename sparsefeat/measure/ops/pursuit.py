"""matching_pursuit over the decoder's rows (ITDA)."""

from __future__ import annotations

import sparsefeat_kernels as kernels
import torch
from torch import Tensor

from sparsefeat.measure.ops.encode import encode_cost
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import DENSE, OURS, Provider


def _dense_pursuit(case: SAECase) -> tuple[Tensor, Tensor]:
    """Plain matching pursuit: k products with the whole dictionary, one atom a row each."""
    residual, values, indices = case.x.clone(), [], []
    for _ in range(case.k):
        c = residual @ case.W_dec.T
        best = c.abs().argmax(1)
        step = c.gather(1, best[:, None])
        residual -= step * case.W_dec[best]
        values.append(step)
        indices.append(best[:, None])
    return torch.cat(values, 1), torch.cat(indices, 1)


def pursuit_fault(case: SAECase, answer: tuple[Tensor, Tensor]) -> str:
    """Ways part at near-ties: what must agree is how much of every row is left."""
    rows = case.rows
    part = SAECase(
        case.x[rows].double(), case.W_enc, case.b_enc, case.W_dec.double(), case.b, case.k, case.values, case.indices,
        case.dead, case.dtype,
    )  # fmt: skip
    left = []
    for values, indices in (_dense_pursuit(part), tuple(t[rows] for t in answer)):
        spent = (values.double()[:, None] @ part.W_dec[indices.long()])[:, 0]
        left.append((part.x - spent).norm(dim=1))
    off = float(((left[1] - left[0]) / left[0]).abs().mean())
    return "" if off < 1e-3 else f"{off:.4f} more or less of the rows is left"


def _pursuit_providers() -> list[Provider]:
    def ours(case: SAECase) -> tuple[Tensor, Tensor]:
        return kernels.matching_pursuit(case.x, case.W_dec, case.k, "matching")

    return [Provider(OURS, ours), Provider(DENSE, _dense_pursuit)]


def _pursuit_cost(s: Shape, size: int) -> tuple[float, float]:
    flops, once = encode_cost(s, size)
    return s["k"] * flops, once


OPS = {"matching_pursuit": Op(_pursuit_providers, pursuit_fault, _pursuit_cost)}
