"""The loss of a batch for SAEs that select: one pass over the encoder for the code, that of 4 k and the dead latents'.

`sparsefeat.training.objective.objectives` has the formulas; `sparsefeat.training.objective.penalised` the SAEs that do not select.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from sparsefeat_kernels import SparseCode, auxk_decode, auxk_encode
from torch import Tensor

from sparsefeat.sae import SAE
from sparsefeat.sae.activations import SELECTION, batch_topk_encode
from sparsefeat.training.objective.objectives import SORTED, Objective


class Across(Protocol):
    """Adds up what the processes that share a batch have of it, in place or not; gradients do not pass."""

    @property
    def shared(self) -> bool:
        """Whether there is more than one process."""
        ...

    def sum(self, part: Tensor) -> Tensor: ...

    def least(self, part: Tensor) -> Tensor: ...


class OneProcess:
    """The whole batch is here."""

    shared = False

    def sum(self, part: Tensor) -> Tensor:
        return part

    def least(self, part: Tensor) -> Tensor:
        return part


ONE = OneProcess()

WITH_BIAS = ("unbox", "saeuron", "fae")  # auxiliary losses


class Batch(NamedTuple):
    """rows `[rows, d_model]`; of a transcoder the target, of the same shape; of an SAE with normalizer "timestep" each
    row's timestep `[rows]`, as the model is given it."""

    rows: Tensor
    target: Tensor | None = None
    timestep: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """total carries the gradient, and of a batch shared by several processes this one's part of it: sum the gradients.

    fvu, parts: detached, of the whole batch. code: what the rows here were encoded to, None where all latents' activations
    were worked out; then `counts` `[n_latents]` says how often each fired here.
    """

    total: Tensor
    fvu: Tensor
    parts: Mapping[str, Tensor]
    code: SparseCode | None = None
    counts: Tensor | None = None
    rows: int = 0
    l0: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float32))


@dataclass(frozen=True)
class Spread:
    """What errors are divided by: the batch's rows and `sum (x - mean(x))^2`, over all processes."""

    rows: Tensor | int
    variance: Tensor
    d_model: int

    @classmethod
    def of(cls, x: Tensor, ranks: Across = ONE) -> Spread:
        x, rows = x.detach(), x.shape[0]
        if not ranks.shared:
            variance = squares(x, x.mean(0).expand_as(x))
        else:
            rows = ranks.sum(x.new_full((), rows))  # a copy from the host would wait for a GPU
            variance = ranks.sum(squares(x, (ranks.sum(x.sum(0)) / rows).expand_as(x)))
        # At least the smallest normal number: a batch of equal rows must not divide by zero.
        return cls(rows, variance.clamp_min(torch.finfo(x.dtype).tiny), x.shape[1])

    def error(self, y: Tensor, x_hat: Tensor, kind: str) -> Tensor:
        """This process' part of the reconstruction's error."""
        if kind == "l2":
            # The norm's gradient at zero is taken as zero.
            of_row = (y - x_hat).square().sum(-1)
            norms = of_row.where(of_row > 0, 1).sqrt().where(of_row > 0, 0)
            return norms.sum() / (self.rows * math.sqrt(self.d_model))
        return squares(y, x_hat) / (self.variance if kind == "fvu" else self.rows * self.d_model)


def squares(a: Tensor, b: Tensor) -> Tensor:
    """sum (a - b)^2 of two tensors of one shape: three passes over them with the gradient, where separate operations make seven."""
    return F.mse_loss(a, b, reduction="sum")


def training_loss(
    sae: SAE,
    x: Tensor,
    dead: Tensor | None = None,
    objective: Objective | None = None,
    *,
    target: Tensor | None = None,
    ranks: Across = ONE,
) -> Loss:
    """The loss of a batch `x [rows, d_model]` for an SAE that selects; `dead [n_latents]` bool, None when none is.

    target: what is reconstructed, None for `x`.
    """
    objective = objective or Objective()
    y = x if target is None else target
    spread = Spread.of(y, ranks)
    auxk, wanted = objective.auxk_of(sae.config), objective.k_aux or max(1, sae.d_model // 2)
    latents = dead.nonzero().squeeze(-1) if auxk and dead is not None else None
    code, aux_code, wide_code = _encode(sae, x, latents, wanted, bool(objective.multi_topk), ranks)
    x_hat, guess = _decode(sae, x, code, aux_code, latents)
    kind = objective.reconstruction
    error = spread.error(y, x_hat, kind)
    fvu = _of_all(error if kind == "fvu" else squares(y, x_hat.detach()) / spread.variance, ranks)
    nested = _nested(code, objective)
    if nested:
        others = [spread.error(y, sae.decode(part, like=x), kind) for part in nested]
        error = (error + sum(others)) / (1 + len(others))
    total, parts = error, {}
    if auxk:
        n_dead = 0 if latents is None else latents.numel()
        if objective.aux in WITH_BIAS:
            bias = sae.change_of(sae.b_out.expand(x.shape[0], -1), x)
            guess = bias if guess is None else guess + bias
        else:
            bias = None
        aux = auxiliary(objective.aux, y, x_hat, guess, bias, n_dead, wanted, spread, ranks)
        if aux is not None:
            total = torch.add(total, aux, alpha=auxk)
        parts["auxk"] = fvu * 0 if aux is None else _of_all(aux, ranks)
    if wide_code is not None:
        wide = spread.error(y, sae.decode(wide_code, like=x), kind)
        total = total + objective.multi_topk * wide
        parts["multi_topk"] = _of_all(wide, ranks)
    return Loss(total, fvu, parts, code, rows=x.shape[0])


def _of_all(part: Tensor, ranks: Across) -> Tensor:
    """A part of the loss, of the whole batch and detached."""
    return ranks.sum(part.detach().clone()) if ranks.shared else part.detach()


def auxiliary(
    kind: str,
    y: Tensor,
    x_hat: Tensor,
    guess: Tensor | None,
    bias: Tensor | None,
    n_dead: int,
    k_aux: int,
    spread: Spread,
    ranks: Across = ONE,
) -> Tensor | None:
    """This process' part of L_aux, None where it is nothing; `guess [rows, d_model]` has the bias where its kind is
    `WITH_BIAS`, and is None without any."""
    share = min(n_dead / k_aux, 1.0)
    if guess is None or (not n_dead and kind != "unbox"):
        return None
    if kind == "fae":
        return squares(guess, x_hat.detach()) / (spread.rows * spread.d_model)
    if kind == "saeuron":
        missed = squares(guess, x_hat - y)
    else:
        aim = y - x_hat.detach()
        missed = squares(guess, aim if bias is None else aim + bias.detach())
    if kind in ("residual", "saeuron"):
        return (missed if share == 1 else share * missed) / spread.variance
    return (missed / Spread.of(aim, ranks).variance).nan_to_num(0.0)


def _nested(code: SparseCode, objective: Objective) -> list[SparseCode]:
    """The code of the first latents only, or of the largest activations only; without the whole one."""
    n = code.n_latents
    values, indices = code.values, code.indices
    of_latents = [SparseCode(values.where(indices < m, 0), indices, n) for m in objective.prefixes[:-1]]
    return of_latents + [SparseCode(values[:, :j], indices[:, :j], n) for j in objective.levels[:-1]]


def _encode(
    sae: SAE, x: Tensor, latents: Tensor | None, k_aux: int, wide: bool, ranks: Across
) -> tuple[SparseCode, SparseCode | None, SparseCode | None]:
    """The code, that of the dead latents (None without any) and that of 4 k (None unless asked), in as few passes over
    the encoder as the activation allows: of top-k one, as the code of 4 k begins with the code of k."""
    config, n = sae.config, sae.n_latents
    of_topk = config.activation in SORTED
    k = config.k or 1
    k_wide = min(n, 4 * k)
    aux_code = wide_code = None
    if latents is not None and latents.numel():
        rows = sae.normalize(x)
        selected = SELECTION[config.activation] if of_topk else "relu"
        weights = (sae.W_enc, sae.b_enc, sae.b_pre)
        first = k_wide if wide and of_topk else k if of_topk else 1
        prepared = sae.prepared(len(rows))
        parts = auxk_encode(rows, *weights, first, latents, min(k_aux, latents.numel()), selected, prepared=prepared)
        aux_code = SparseCode(parts[2], parts[3], n)
        code = SparseCode(parts[0], parts[1], n) if of_topk else _batch_topk(sae, x, k, ranks)
    elif of_topk:
        code = sae.encode(x, k=k_wide) if wide else sae.encode(x)
    else:
        code = _batch_topk(sae, x, k, ranks)
    if wide:
        wide_code = code if of_topk else _batch_topk(sae, x, k_wide, ranks)
        code = SparseCode(code.values[:, :k], code.indices[:, :k], n) if of_topk else code
    return code, aux_code, wide_code


def _batch_topk(sae: SAE, x: Tensor, k: int, ranks: Across) -> SparseCode:
    """The largest of the whole batch, whoever has them."""
    weights = (sae.W_enc, sae.b_enc, sae.b_pre)
    return batch_topk_encode(sae.normalize(x), *weights, k, ranks.sum if ranks.shared else None)


def _decode(
    sae: SAE, x: Tensor, code: SparseCode, aux: SparseCode | None, latents: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x_hat, and the dead latents' guess at what is missing (without bias; None without their code)."""
    if aux is None or latents is None:
        return sae.decode(code, like=x), None
    x_hat, guess = auxk_decode(code.values, code.indices, aux.values, aux.indices, latents, sae.W_dec, sae.b_out)
    return sae.denormalize(x_hat, like=x), sae.change_of(guess, x)
