"""Muon (Jordan et al. 2024): momentum whose update is orthogonalised, for matrices and convolutions; AdamW for the rest.

An update is the nearest semi-orthogonal matrix to the momentum, by five steps of a quintic Newton-Schulz iteration in
bfloat16; convolutions count as [out, in x height x width]. Steps are scaled by 0.2 sqrt(max(rows, columns)) (Liu et
al. 2025, arXiv 2502.16982), so that learning rate and weight decay mean what they mean for AdamW.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalised(matrices: Tensor) -> Tensor:
    """[n, rows, columns] to about the nearest semi-orthogonal ones (singular values between 0.7 and 1.2)."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7)
    x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[tuple(parameter.flatten(1).shape)].append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                    momentum.lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = group["lr"] * 0.2 * max(rows, columns) ** 0.5
                for parameter, update in zip(parameters, orthogonalised(torch.stack(updates)), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.view(parameter.shape).to(parameter.dtype), alpha=-scale)


class Both:
    """Muon for the matrices of a module, AdamW for its vectors, embeddings and first and last layers, as one."""

    def __init__(self, module: nn.Module, lr: float, ends: tuple[str, ...]) -> None:
        named = list(module.named_parameters())
        inner = [p for name, p in named if p.dim() >= 2 and not any(end in name for end in ends)]
        inside = {id(p) for p in inner}
        rest = [p for _, p in named if id(p) not in inside]
        self.parts = (
            Muon(inner, lr, weight_decay=0.01),
            torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        )

    def set_lr(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        for part in self.parts:
            part.step()
            part.zero_grad()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
