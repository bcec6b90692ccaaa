"""The inputs of the SAE ops, and what they are in plain dense PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparsefeat.measure.answers import PREACTIVATION, checked_rows, torch_dtype

AUXK = 1 / 32
LATENT_TILE = 1 << 15  # fp64 copies of encoder rows, a tile at a time: 200 MiB at d = 768
ROW_TILE = 512


@dataclass(frozen=True)
class SAECase:
    """Activations and an SAE of unit encoder and decoder rows; `b` is subtracted before encoding and added after.

    values, indices: a code of k distinct latents a row. dead: the latents AuxK is over, twice d_model of them.
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b: Tensor
    k: int
    values: Tensor
    indices: Tensor
    dead: Tensor
    dtype: str
    extra: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> Tensor:
        return checked_rows(len(self.x)).to(self.x.device)

    @cached_property
    def preactivations(self) -> Tensor:
        """fp64 [checked rows, n_latents], a tile of latents at a time."""
        centred = self.x[self.rows].double() - self.b.double()
        tiles = zip(self.W_enc.split(LATENT_TILE), self.b_enc.split(LATENT_TILE), strict=True)
        return torch.cat([centred @ w.double().T + b.double() for w, b in tiles], dim=1)

    @cached_property
    def dense_code(self) -> Tensor:
        return self.values.new_zeros(len(self.x), len(self.W_dec)).scatter_(1, self.indices.long(), self.values)

    @cached_property
    def is_dead(self) -> Tensor:
        mask = torch.zeros(len(self.W_enc), dtype=torch.bool, device=self.x.device)
        mask[self.dead] = True
        return mask

    @cached_property
    def tied(self) -> Tensor:
        """bool [n_latents]: latents that no rounding-proof order puts in or out of the k of every row."""
        mask = torch.zeros(len(self.W_enc), dtype=torch.bool, device=self.x.device)
        for x in self.x.split(ROW_TILE):
            a = (x.double() - self.b.double()) @ self.W_enc.double().T + self.b_enc.double()
            kth = a.topk(self.k).values[:, -1:]
            near = (a - kth).abs() <= PREACTIVATION[self.dtype] * a.abs().amax(1, keepdim=True)
            mask |= (near & (near.sum(1, keepdim=True) > 1)).any(0)
        return mask

    @cached_property
    def training_reference(self) -> dict[str, Tensor]:
        W_enc, b_enc, W_dec, b = (t.double() for t in (self.W_enc, self.b_enc, self.W_dec, self.b))
        return dense_step(self.x.double(), W_enc, b_enc, W_dec, b, self.k, self.is_dead)


def sae_case(
    rows: int, d_model: int, n_latents: int, k: int, dtype: str, device: str, seed: int, dead_norm: float = 1.0
) -> SAECase:
    """Random activations, weights and codes. dead_norm: of the dead latents' encoder rows; well below 1 they are never
    among the k largest, and stay dead."""
    g = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device)

    def unit_rows() -> Tensor:
        w = normal(n_latents, d_model)
        return w.div_(w.norm(dim=1, keepdim=True))

    # One latent from each of k stretches of the dictionary: distinct, and anywhere in memory.
    stretch = n_latents // k
    indices = torch.randint(stretch, (rows, k), generator=g, device=device) + torch.arange(k, device=device) * stretch
    n_dead = min(2 * d_model, n_latents // 2)
    dead = torch.randperm(n_latents, generator=g, device=device)[:n_dead].sort().values
    W_enc = unit_rows()
    W_enc[dead] *= dead_norm
    small = [(0.1 * normal(size)).to(torch_dtype(dtype)) for size in (n_latents, d_model)]
    values = normal(rows, k).abs_().add_(0.1).to(torch.float64 if dtype == "float64" else torch.float32)
    return SAECase(
        normal(rows, d_model).to(torch_dtype(dtype)), W_enc.to(torch_dtype(dtype)), small[0],
        unit_rows().to(torch_dtype(dtype)), small[1], k,
        values, indices.int(), dead, dtype,
    )  # fmt: skip


def with_dense_code(case: SAECase) -> SAECase:
    """The case, its code as a dense tensor of the weights' dtype in extra["code"]."""
    case.extra["code"] = case.dense_code.to(case.W_dec.dtype)
    return case


def dense_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, b: Tensor, k: int) -> Tensor:
    """What SAELens computes: every pre-activation, the k largest of a row, and zeros elsewhere."""
    values, indices = ((x - b) @ W_enc.T + b_enc).topk(k, sorted=False)
    return values.new_zeros(len(x), len(W_enc)).scatter_(1, indices, values.relu())


def dense_step(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int, is_dead: Tensor
) -> dict[str, Tensor]:
    """Loss and gradients of `sparsefeat.training.objective.objectives`, from dense codes."""
    W_enc, b_enc, W_dec, b = (t.detach().requires_grad_() for t in (W_enc, b_enc, W_dec, b))
    with torch.enable_grad():
        loss = dense_loss(x, W_enc, b_enc, W_dec, b, k, is_dead)
        names = ("W_enc", "b_enc", "W_dec", "b")
        gradients = torch.autograd.grad(loss, (W_enc, b_enc, W_dec, b))
    return {"loss": loss.detach(), **dict(zip(names, gradients, strict=True))}


def dense_loss(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b: Tensor, k: int, is_dead: Tensor) -> Tensor:
    a = (x - b) @ W_enc.T + b_enc
    values, indices = a.topk(k, sorted=False)
    x_hat = torch.zeros_like(a).scatter(1, indices, values.relu()) @ W_dec + b
    variance = (x - x.mean(0)).square().sum()
    n_dead, wanted = int(is_dead.sum()), x.shape[1] // 2
    values, indices = torch.where(is_dead, a, -torch.inf).topk(min(wanted, n_dead), sorted=False)
    guess = torch.zeros_like(a).scatter(1, indices, values.relu()) @ W_dec
    missed = (guess - (x - x_hat).detach()).square().sum()
    return ((x - x_hat).square().sum() + AUXK * min(n_dead / wanted, 1.0) * missed) / variance
