"""The whole of an SAE: the forward pass, a training step with AuxK, and the gradient of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sparsefeat_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.measure.answers import HALF, OUTPUT, PREACTIVATION, checked_rows, output_fault, relative
from sparsefeat.measure.ops.decode import decode_cost
from sparsefeat.measure.ops.encode import encode_cost, our_encode, with_prepared
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.sae_case import AUXK, SAECase, dense_encode, dense_step, sae_case, with_dense_code
from sparsefeat.measure.timing import DENSE, OURS, Provider
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Objective, training_loss

CHECKED_LATENTS = 1024
# Gradients of a step, relative, fp32.
GRADIENT = 1e-2
# In half precision every second row has such a tie: direction and length are compared instead.
COSINE = 0.97


def reconstruction_fault(case: SAECase, answer: Tensor) -> str:
    """Against the reconstruction in fp64. Latents within the tolerance of the k-th may be in or out: what they could
    change is allowed for, row by row."""
    a = case.preactivations
    top, indices = a.topk(case.k)
    reference = (top.relu()[:, None] @ case.W_dec[indices].double())[:, 0] + case.b.double()
    near = (a - top[:, -1:]).abs() <= PREACTIVATION[case.dtype] * a.abs().amax(1, keepdim=True)
    near &= near.sum(1, keepdim=True) > 1
    slack = (torch.where(near, a.relu(), 0)).sum(1) * case.W_dec.double().norm(dim=1).amax()
    errors = (answer[case.rows].double() - reference).norm(dim=1)
    allowed = OUTPUT[case.dtype] * reference.norm(dim=1) + slack
    worst = (errors / allowed).amax()
    return "" if worst <= 1 else f"a row is {float(worst):.1f} tolerances off"


def training_fault(case: SAECase, answer: Mapping[str, Any]) -> str:
    """The loss and its gradients, of CHECKED_LATENTS latents. Left out: encoder rows of dead ones, which some libraries'
    AuxK does not reach, and in fp32 whatever may change places with its tie in a row (one row's term is 1 % of the
    gradient of a thousand latents)."""
    reference = case.training_reference
    spread = torch.linspace(0, len(case.W_enc) - 1, min(len(case.W_enc), CHECKED_LATENTS), device=case.x.device)
    every = spread.round().long().unique()
    half = case.dtype in HALF
    if not half:
        every = every[~case.tied[every]]
    live = every[~case.is_dead[every]]
    pairs = {
        "W_dec": (answer["W_dec"][every], reference["W_dec"][every]),
        "W_enc": (answer["W_enc"][live], reference["W_enc"][live]),
        "b_enc": (answer["b_enc"][live], reference["b_enc"][live]),
    }
    if abs(float(answer["loss"]) / float(reference["loss"]) - 1) > (0.02 if half else 1e-3):
        return f"the loss is {float(answer['loss']):.5f}, not {float(reference['loss']):.5f}"
    for name, (got, wanted) in pairs.items():
        cosine = float(F.cosine_similarity(got.double().flatten(), wanted.flatten(), dim=0))
        ratio = float(got.double().norm() / wanted.norm())
        if half and (cosine < COSINE or abs(ratio - 1) > 0.05):
            return f"the gradient of {name} has cosine {cosine:.3f} and {ratio:.3f} of the length"
        if not half and relative(got, wanted) > GRADIENT:
            return f"the gradient of {name} is {relative(got, wanted):.4f} off"
    return ""


def as_sae(case: SAECase) -> SAE:
    """A trainable SAE that shares the case's weights."""
    config = SAEConfig(d_model=case.x.shape[1], n_latents=len(case.W_enc), activation="topk", k=case.k)
    with torch.device("meta"):
        sae = SAE(config)
    weights = {"W_enc": case.W_enc, "b_enc": case.b_enc, "W_dec": case.W_dec, "b_pre": case.b, "b_out": case.b}
    for name, tensor in weights.items():
        setattr(sae, name, torch.nn.Parameter(tensor.detach()))
    return sae.train()


def forget(_: object) -> None:
    """The memory that gradients keep: it is as large as the weights."""
    kernels.release_gradient_memory()


def our_step(state: tuple[SAECase, SAE]) -> dict[str, Tensor]:
    case, sae = state
    with torch.no_grad():
        sae.b_enc.add_(0.0)  # an optimiser's step would change the weights: nothing made from them may be kept
    loss = training_loss(sae, case.x, case.is_dead, Objective(auxk=AUXK)).total
    gradients = torch.autograd.grad(loss, (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_pre, sae.b_out))
    return {"loss": loss.detach(), **dict(zip(("W_enc", "b_enc", "W_dec"), gradients[:3], strict=True))}


def our_forward(case: SAECase, prepared: Any = None) -> Tensor:
    return kernels.sparse_decode(*our_encode(case, prepared), case.W_dec, case.b)


def _step_inputs(shape: Shape, dtype: str, device: str, seed: int) -> SAECase:
    return sae_case(**shape, dtype=dtype, device=device, seed=seed, dead_norm=0.3)


def _forward_providers() -> list[Provider]:
    return [
        Provider(OURS, our_forward),
        *with_prepared(our_forward),
        Provider(DENSE, lambda c: dense_encode(c.x, c.W_enc, c.b_enc, c.b, c.k) @ c.W_dec + c.b),
    ]


def _training_providers() -> list[Provider]:
    return [
        Provider(OURS, our_step, lambda case: (case, as_sae(case)), forget=forget),
        Provider(DENSE, lambda c: dense_step(c.x, c.W_enc, c.b_enc, c.W_dec, c.b, c.k, c.is_dead)),
    ]


# The gradient of a decoder: z^T x.


def _dense_gradient(case: SAECase) -> tuple[Tensor, Tensor]:
    z = case.extra["code"]
    return z.T @ (case.x - case.b), z.sum(0)


def gradient_fault(case: SAECase, answer: tuple[Tensor, Tensor]) -> str:
    latents = checked_rows(len(case.W_enc)).to(case.x.device)
    z = case.dense_code[:, latents].double()
    return output_fault(answer[0][latents], z.T @ (case.x.double() - case.b.double()), case.dtype)


def _gradient_providers() -> list[Provider]:
    def ours(case: SAECase) -> tuple[Tensor, Tensor]:
        return kernels.weight_gradient(case.values, case.indices, case.x, case.b, len(case.W_enc))

    return [Provider(OURS, ours, forget=forget), Provider(DENSE, _dense_gradient, with_dense_code)]


def _forward_cost(s: Shape, size: int) -> tuple[float, float]:
    (a, b), (c, d) = encode_cost(s, size), decode_cost(s, size)
    return a + c, b + d


def _training_cost(s: Shape, size: int) -> tuple[float, float]:
    """Both encodes and decodes, and three gathers of each code backwards: values, W_dec, W_enc."""
    rows, d, n, k = (s[name] for name in ("rows", "d_model", "n_latents", "k"))
    aux = {"rows": rows, "d_model": d, "n_latents": min(2 * d, n // 2), "k": min(d // 2, n // 2)}
    parts = [_forward_cost(s, size), _forward_cost(aux, size), *3 * [decode_cost({**s, "k": k + aux["k"]}, size)]]
    return sum(p[0] for p in parts), sum(p[1] for p in parts) + 2.0 * size * n * d


def _gradient_cost(s: Shape, size: int) -> tuple[float, float]:
    flops, gathered = decode_cost(s, size)
    return flops, gathered + size * s["n_latents"] * s["d_model"]


OPS = {
    "forward": Op(_forward_providers, reconstruction_fault, _forward_cost),
    "training_step": Op(_training_providers, training_fault, _training_cost, _step_inputs, gradients=True),
    "weight_gradient": Op(_gradient_providers, gradient_fault, _gradient_cost),
}
