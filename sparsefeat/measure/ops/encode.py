"""topk_encode and threshold_encode, beside the bare product and dense PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sparsefeat_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.measure.answers import PREACTIVATION
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.sae_case import SAECase, dense_encode
from sparsefeat.measure.timing import DENSE, OURS, Provider

PREPARED = f"{OURS}, weights prepared"


def code_fault(case: SAECase, answer: Any) -> str:
    """`answer`: values and indices, or the dense code. A tolerance-aware comparison of sets: every latent that is in
    has its value, and no latent left out is more than the tolerance above one that is in."""
    if isinstance(answer, Tensor):
        values, indices = answer[case.rows].topk(case.k)
    else:
        values, indices = (t[case.rows] for t in answer)
    a, values, indices = case.preactivations, values.double(), indices.long()
    if tuple(values.shape) != (len(case.rows), case.k):
        return f"the code has shape {tuple(values.shape)}"
    if not values.isfinite().all():
        return "values are not finite"
    tolerance = PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    chosen = a.gather(1, indices)
    off = ((chosen.relu() - values).abs() / tolerance).amax()
    if off > 1:
        return f"a value is {float(off):.1f} tolerances off"
    ordered = indices.sort(1).values
    if ((ordered.diff(dim=1) == 0) & (values.sort(1).values[:, 1:] > 0)).any():
        return "a latent was chosen twice"
    left_out = a.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    missed = (left_out - chosen.amin(1, keepdim=True)).relu() / tolerance
    if missed.amax() > 1:
        return f"a latent that was left out is {float(missed.amax()):.1f} tolerances above one that is in"
    return ""


def prepare_weights(case: SAECase) -> tuple[SAECase, Any]:
    return case, kernels.prepare_encoder(case.W_enc, case.b_enc)


def our_encode(case: SAECase, prepared: Any = None) -> tuple[Tensor, Tensor]:
    weights = (case.W_enc, case.b_enc, case.b)
    return kernels.topk_encode(case.x, *weights, case.k, prepared=prepared)


def with_prepared(run: Callable[..., Any]) -> list[Provider]:
    note = "the weights' bf16 copy and norms are kept between calls"
    return [Provider(PREPARED, lambda state: run(*state), prepare_weights, note=note)]


def product_fault(case: SAECase, answer: Tensor) -> str:
    wanted = case.preactivations
    off = ((answer[case.rows].double() - wanted).abs() / (PREACTIVATION[case.dtype] * wanted.abs().amax())).amax()
    return "" if off <= 1 else f"the product is {float(off):.1f} tolerances off"


def bf16_product_fault(case: SAECase, answer: Tensor) -> str:
    return product_fault(replace(case, dtype="bfloat16"), answer)


PRODUCT = Provider(
    "the product alone",
    lambda case: F.linear(case.x, case.W_enc, case.extra["bias"]),
    lambda case: (case.extra.setdefault("bias", case.b_enc - case.W_enc @ case.b), case)[1],
    check=product_fault,
    bound=True,
    note="F.linear, which writes [rows, n_latents]: no code is selected",
)
BF16_PRODUCT = Provider(
    "the bf16 product alone",
    lambda low: F.linear(*low),
    lambda case: tuple(t.bfloat16() for t in (case.x, case.W_enc, case.b_enc - case.W_enc @ case.b)),
    check=bf16_product_fault,
    bound=True,
    note="F.linear of inputs and weights rounded to bf16",
)


def _encode_providers() -> list[Provider]:
    return [
        Provider(OURS, our_encode),
        *with_prepared(our_encode),
        PRODUCT,
        BF16_PRODUCT,
        Provider(DENSE, lambda c: dense_encode(c.x, c.W_enc, c.b_enc, c.b, c.k)),
    ]


# Threshold encoding (JumpReLU): a threshold that k latents a row pass on average.


def _threshold(case: SAECase) -> float:
    return float(case.preactivations.topk(case.k).values[:, -1].mean())


def threshold_inputs(case: SAECase) -> tuple[SAECase, Tensor]:
    return case, torch.tensor(_threshold(case), device=case.x.device, dtype=case.x.dtype)


def _our_threshold(state: tuple[SAECase, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    case, threshold = state
    most = min(8 * case.k, len(case.W_enc))
    return kernels.threshold_encode(case.x, case.W_enc, case.b_enc, case.b, threshold, most)


def _dense_threshold(state: tuple[SAECase, Tensor]) -> Tensor:
    case, threshold = state
    a = (case.x - case.b) @ case.W_enc.T + case.b_enc
    return a * (a > threshold)


def _threshold_dense_rows(state: tuple[SAECase, Tensor], answer: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    case = state[0]
    values, indices, counts = (t[case.rows] for t in answer)
    z = values.new_zeros(len(case.rows), len(case.W_enc)).scatter_add_(1, indices.long(), values)
    return torch.where((counts > values.shape[1])[:, None], torch.nan, z)  # a row that overflowed is not right


def threshold_fault(case: SAECase, answer: Tensor) -> str:
    a, threshold = case.preactivations, float(threshold_inputs(case)[1])
    tolerance = PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    wanted = torch.where(a > threshold, a, 0)
    undecided = (a - threshold).abs() <= tolerance
    right = ((answer.double() - wanted).abs() <= tolerance) | (
        undecided & ((answer == 0) | (answer - a).abs().le(tolerance))
    )
    return "" if bool(right.all()) else "a latent is active that should not be, or has another value"


def _threshold_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_threshold, threshold_inputs, _threshold_dense_rows),
        PRODUCT,
        Provider(DENSE, _dense_threshold, threshold_inputs, lambda state, z: z[state[0].rows]),
    ]


def encode_cost(s: Shape, size: int) -> tuple[float, float]:
    rows, d, n, k = (s[name] for name in ("rows", "d_model", "n_latents", "k"))
    return 2.0 * rows * n * d, size * (rows * d + n * d + n + d) + 8.0 * rows * k


OPS = {
    "topk_encode": Op(_encode_providers, code_fault, encode_cost),
    "threshold_encode": Op(_threshold_providers, threshold_fault, encode_cost),
}
