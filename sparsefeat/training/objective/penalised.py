"""The loss of a batch for SAEs that do not select: ReLU, JumpReLU and Gated SAEs, kept sparse by a penalty.

Early in training half of the latents are active, and thresholds learn from pre-activations that are not, so these are
worked out for all latents: `PRE_BYTES` of them at a time, and again in the backward pass.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsefeat.sae import SAE
from sparsefeat.training.objective.losses import ONE, Across, Loss, Spread, squares
from sparsefeat.training.objective.objectives import TANH_SCALE, Objective

PRE_BYTES = 256 << 20


class Gate(NamedTuple):
    """Of a gated SAE, both `[n_latents]`: the logarithm of the magnitude's factor, and the gate's own bias."""

    log_factor: Tensor
    bias: Tensor


class _JumpReLU(torch.autograd.Function):
    """pre where it is above the threshold, else 0; the threshold's derivative is -threshold / bandwidth within the band."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * _above(pre, threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        pulled = gradient * _in_band(pre, threshold, ctx.bandwidth) * (-threshold / ctx.bandwidth)
        return gradient * _above(pre, threshold), pulled.sum(0), None


class _Step(torch.autograd.Function):
    """1 where pre is above the threshold, else 0; the threshold's derivative is -1 / bandwidth within the band."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return _above(pre, threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        return None, (gradient * _in_band(pre, threshold, ctx.bandwidth) / -ctx.bandwidth).sum(0), None


def _above(pre: Tensor, threshold: Tensor) -> Tensor:
    return (pre > threshold) & (pre > 0)


def _in_band(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return (pre - threshold).abs() < bandwidth / 2


class _Sums(NamedTuple):
    """Sums over the rows of one part: they add up."""

    error: Tensor  # in its part of the loss
    squares: Tensor
    penalty: Tensor
    pre_act: Tensor
    frozen: Tensor  # the error of what a gate reconstructs by itself
    counts: Tensor


def penalised_loss(
    sae: SAE,
    x: Tensor,
    objective: Objective,
    weight: Tensor | float,
    *,
    thresholds: Tensor | None = None,
    gate: Gate | None = None,
    target: Tensor | None = None,
    timestep: Tensor | None = None,
    ranks: Across = ONE,
) -> Loss:
    """The loss of a batch `x [rows, d_model]` for a ReLU, JumpReLU (`thresholds [n_latents]`) or gated SAE.

    weight: of the penalty. target: what is reconstructed, None for `x`. timestep: of each row.
    """
    y = x if target is None else target
    spread = Spread.of(y, ranks)
    at_once = max(1, PRE_BYTES // (sae.n_latents * x.element_size()))
    parts = range(0, x.shape[0], at_once)

    def sums_of(first: int) -> _Sums:
        part = slice(first, first + at_once)
        if timestep is not None:
            sae.at_timestep(timestep[part])
        return _sums(sae, x[part], y[part], objective, thresholds, gate, spread)

    found = [sums_of(0)] if len(parts) == 1 else [checkpoint(sums_of, p, use_reentrant=False) for p in parts]
    summed = _Sums(*(torch.stack(column).sum(0) for column in zip(*found, strict=True)))
    penalty, pre_act = summed.penalty / spread.rows, summed.pre_act / spread.rows
    if objective.penalty == "l0" and objective.l0_target is not None:
        # Of the square of all processes' mean this one's part: its rows' share, with the gradient of its penalty.
        excess = ranks.sum(penalty.detach().clone()) / objective.l0_target - 1
        share = x.shape[0] / spread.rows * excess.square()
        penalty = share + 2 * excess / objective.l0_target * (penalty - penalty.detach())
    total = summed.error + weight * penalty + objective.pre_act * pre_act + summed.frozen
    reported = {"penalty": penalty, "pre_act": pre_act, "gate": summed.frozen}
    absent = {"pre_act": not objective.pre_act, "gate": gate is None, "penalty": False}
    return Loss(
        total,
        ranks.sum(summed.squares.clone()) / spread.variance,
        {name: ranks.sum(part.detach().clone()) for name, part in reported.items() if not absent[name]},
        counts=summed.counts,
        rows=x.shape[0],
    )


def _sums(
    sae: SAE,
    x: Tensor,
    y: Tensor,
    objective: Objective,
    thresholds: Tensor | None,
    gate: Gate | None,
    spread: Spread,
) -> _Sums:
    rows = sae.normalize(x) - sae.b_pre
    if gate is None:
        pre = torch.addmm(sae.b_enc, rows, sae.W_enc.T)
        threshold = pre.new_zeros(()) if thresholds is None else thresholds
        active = pre.relu() if thresholds is None else _JumpReLU.apply(pre, threshold, objective.bandwidth)
        penalised = active
    else:
        shared = rows @ sae.W_enc.T
        pre = shared + gate.bias
        active = (shared * gate.log_factor.exp() + sae.b_enc).relu() * (pre.detach() > 0)
        penalised = pre.relu()
    nothing = x.new_zeros(())
    if objective.penalty == "l1":
        penalty = penalised.sum()
    elif objective.penalty == "tanh":
        penalty = (TANH_SCALE * penalised).tanh().sum()
    else:
        penalty = _Step.apply(pre, threshold, objective.bandwidth).sum()
    x_hat = sae.denormalize(active @ sae.W_dec + sae.b_out, like=x)
    error = spread.error(y, x_hat, objective.reconstruction)
    for prefix in objective.prefixes[:-1]:
        part = active[:, :prefix] @ sae.W_dec[:prefix] + sae.b_out
        error = error + spread.error(y, sae.denormalize(part, like=x), objective.reconstruction)
    error = error / max(1, len(objective.prefixes))
    frozen = nothing
    if gate is not None:
        alone = penalised @ sae.W_dec.detach() + sae.b_out.detach()
        frozen = spread.error(y, sae.denormalize(alone, like=x), objective.reconstruction)
    return _Sums(
        error,
        squares(y, x_hat.detach()),
        penalty,
        (threshold - pre).relu().sum() if objective.pre_act else nothing,
        frozen,
        (active.detach() > (objective.fired_above or 0.0)).sum(0),
    )
