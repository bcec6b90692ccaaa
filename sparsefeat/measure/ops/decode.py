"""sparse_decode and sparse_edit, beside products with the dense code."""

from __future__ import annotations

import sparsefeat_kernels as kernels
import torch
from torch import Tensor

from sparsefeat.measure.answers import output_fault
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.sae_case import SAECase, with_dense_code
from sparsefeat.measure.timing import DENSE, OURS, Provider

EDITED = 8
GAMMA = -2.0  # SAeUron's multipliers are negative


def decode_fault(case: SAECase, answer: Tensor) -> str:
    gathered = case.W_dec[case.indices[case.rows].long()].double()
    reference = (case.values[case.rows].double()[:, None] @ gathered)[:, 0] + case.b.double()
    return output_fault(answer[case.rows], reference, case.dtype)


def _decode_providers() -> list[Provider]:
    def dense(case: SAECase) -> Tensor:
        return case.extra["code"] @ case.W_dec + case.b

    return [
        Provider(OURS, lambda c: kernels.sparse_decode(c.values, c.indices, c.W_dec, c.b)),
        Provider(DENSE, dense, with_dense_code),
    ]


# Edit: EDITED latents of every row's code are multiplied by GAMMA.


def _edited(case: SAECase) -> Tensor:
    return case.indices[0, :EDITED].long()


def _edit_inputs(case: SAECase) -> SAECase:
    latents = _edited(case)
    one = torch.ones(len(latents), device=case.x.device)
    rule = (GAMMA * one, 0 * one, -torch.inf * one, torch.inf * one, -torch.inf * one)
    weight = torch.ones(len(case.x), device=case.x.device)
    case.extra["edit"] = (latents, case.W_dec[latents], *rule, weight)
    return case


def _dense_edit(case: SAECase) -> Tensor:
    """SAeUron's way: the difference of two dense reconstructions."""
    code = case.extra["code"]
    changed = code.clone()
    changed[:, case.extra["latents"]] *= GAMMA
    return case.x + (changed @ case.W_dec - code @ case.W_dec)


def _dense_edit_inputs(case: SAECase) -> SAECase:
    case.extra["latents"] = _edited(case)
    return with_dense_code(case)


def edit_fault(case: SAECase, answer: Tensor) -> str:
    latents, rows = _edited(case), case.rows
    hit = case.indices[rows].long()[:, :, None] == latents
    z = (case.values[rows].double()[:, :, None] * hit).sum(1)
    reference = case.x[rows].double() + (GAMMA - 1) * z @ case.W_dec[latents].double()
    return output_fault(answer[rows], reference, case.dtype)


def _edit_providers() -> list[Provider]:
    return [
        Provider(OURS, lambda c: kernels.sparse_edit(c.x, c.values, c.indices, *c.extra["edit"]), _edit_inputs),
        Provider(DENSE, _dense_edit, _dense_edit_inputs),
    ]


def decode_cost(s: Shape, size: int) -> tuple[float, float]:
    rows, d, k = (s[name] for name in ("rows", "d_model", "k"))
    return 2.0 * rows * k * d, size * (rows * k * d + rows * d + d) + 8.0 * rows * k


def _edit_cost(s: Shape, size: int) -> tuple[float, float]:
    rows, d, k = (s[name] for name in ("rows", "d_model", "k"))
    return 2.0 * rows * EDITED * d, size * (2.0 * rows * d + EDITED * d) + 8.0 * rows * k


OPS = {
    "sparse_decode": Op(_decode_providers, decode_fault, decode_cost),
    "sparse_edit": Op(_edit_providers, edit_fault, _edit_cost),
}
