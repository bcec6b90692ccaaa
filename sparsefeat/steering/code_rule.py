"""Edits of chosen latents of a code, as a change of the activations they came from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sparsefeat_kernels import SparseCode, sparse_edit_delta
from torch import Tensor

from sparsefeat.arguments import finite
from sparsefeat.pipeline import Activations
from sparsefeat.sae import SAE


@dataclass(frozen=True)
class CodeRule:
    """What becomes of the values z of `latents` [F]; every field has one entry a latent.

    z' = clamp(gain z + offset, low, high) where z > gate, else z. The change of an activation row is
    sum over F of (z' - z) W_dec[latent]: the SAE's reconstruction error stays as it was.
    """

    latents: Tensor  # int64
    gain: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    gate: Tensor

    def __post_init__(self) -> None:
        shapes = {tuple(getattr(self, name).shape) for name in ("latents", "gain", "offset", "low", "high", "gate")}
        if shapes != {(self.latents.numel(),)}:
            raise ValueError(
                f"the fields of a rule have shapes {sorted(map(list, shapes))}; give each one entry a latent."
            )
        if self.gain.device.type == "cpu":  # where rules are made; moving one to a GPU must not wait for it
            for name in ("gain", "offset"):
                finite(name, getattr(self, name))
            for name in ("low", "high", "gate"):  # infinite where there is no bound
                finite(name, getattr(self, name), unbounded=True)

    @classmethod
    def build(cls, rules: dict[int, dict[str, float]]) -> CodeRule:
        """From latent -> its fields; left out: gain 1, offset 0, low -inf, high inf, gate -inf (always)."""
        defaults = {"gain": 1.0, "offset": 0.0, "low": -torch.inf, "high": torch.inf, "gate": -torch.inf}
        columns = {
            name: torch.tensor([float(rule.get(name, default)) for rule in rules.values()], dtype=torch.float32)
            for name, default in defaults.items()
        }
        return cls(torch.tensor(list(rules), dtype=torch.int64), **columns)

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def keeps_zero(self) -> bool:
        """Whether a latent that is not active stays so: then rows where none of them is active need no code."""
        moved = torch.minimum(torch.maximum(self.offset, self.low), self.high)
        return bool(((moved == 0) | (self.gate >= 0)).all())

    def to(self, device: torch.device) -> CodeRule:
        return CodeRule(
            *(getattr(self, name).to(device) for name in ("latents", "gain", "offset", "low", "high", "gate"))
        )


def code_edit(activations: Activations, sae: SAE, rule: CodeRule, row_weight: Tensor) -> Tensor | None:
    """[rows, d_model] change of the activations by `rule`, each row's times its weight; None where no row can change.

    Of an SAE with thresholds (ReLU, JumpReLU) only the rule's latents are computed: no latent asks for another's value.
    Of a top-k SAE rows of weight 0 are not encoded. On a CPU neither are rows in which no latent of the rule can be active (see
    `can_be_active`), which for a few latents of a large SAE leaves a small part. The rows that remain are encoded
    in full: whether a latent is among a row's top k depends on all the others.
    """
    x = activations.rows
    device = x.device
    rule, row_weight = rule.to(device), row_weight.to(device, torch.float32)
    wanted = row_weight != 0
    if device.type == "cpu" and rule.keeps_zero and _inactive_unless_positive(sae):
        wanted = wanted.clone()
        wanted[wanted.nonzero()[:, 0]] = can_be_active(x[wanted], sae, rule)
    rows = wanted.nonzero()[:, 0]
    if len(rows) == 0:
        return None
    if sae.config.uses_threshold and not sae.training:
        return code_delta(chosen_latents(x, sae, rule.latents), x, sae, rule, row_weight)
    if 2 * len(rows) > len(x):  # then the code of all rows, which instruments share, costs little more
        return code_delta(activations.code(sae), x, sae, rule, row_weight)
    part = x[rows]
    change = code_delta(sae.encode(part), part, sae, rule, row_weight[rows])
    return change.new_zeros(len(x), change.shape[1]).index_copy_(0, rows, change)


def chosen_latents(x: Tensor, sae: SAE, latents: Tensor) -> SparseCode:
    """The code of `latents` [F] alone, for an SAE with thresholds: 2 rows F d_model FLOPs, F rows of the encoder."""
    weights, bias = sae.W_enc.detach()[latents], sae.b_enc.detach()[latents]
    threshold = sae.threshold
    if threshold is None:
        floor = bias.new_zeros((), dtype=torch.float32)
    else:
        floor = (threshold if threshold.ndim == 0 else threshold[latents]).clamp_min(0)
    rows = sae.normalize(x)
    wide = torch.promote_types(sae.dtype, torch.float32)
    pre = torch.addmm(bias.to(wide), rows.to(wide) - sae.b_pre.detach().to(wide), weights.to(wide).T)
    values = torch.where(pre <= floor.to(wide), 0, pre)  # a row with NaN stays NaN
    return SparseCode(values, latents.to(torch.int32).expand(len(values), -1), sae.n_latents)


def code_delta(code: SparseCode, x: Tensor, sae: SAE, rule: CodeRule, row_weight: Tensor) -> Tensor:
    """`code_edit` for rows that have been encoded."""
    values, indices = code.values, code.indices
    if code.row_offsets is not None:  # the kernel takes the padded form: the rule's latents alone, one column each
        values = code.select(rule.latents)
        indices = rule.latents.to(torch.int32).expand(code.rows, -1)
    scale = sae.row_scale(x)
    if scale is not None:
        row_weight = row_weight * scale[:, 0].to(row_weight.dtype)
    directions = sae.directions(rule.latents).detach()
    return sparse_edit_delta(
        values,
        indices.contiguous(),
        rule.latents,
        directions,
        rule.gain,
        rule.offset,
        rule.low,
        rule.high,
        rule.gate,
        row_weight,
    )


def _inactive_unless_positive(sae: SAE) -> bool:
    """Whether a latent with a pre-activation that is not positive has the value 0, in arithmetic we can bound."""
    return sae.config.activation in ("topk", "batch_topk", "groupmax", "relu", "jumprelu") and sae.dtype in (
        torch.float32,
        torch.float64,
    )


def can_be_active(x: Tensor, sae: SAE, rule: CodeRule) -> Tensor:
    """bool [rows]: whether some latent of the rule may exceed max(0, gate) in the code of this row.

    From the |F| pre-activations alone. Never False for a row that the full encode would find active: the comparison
    allows for twice the rounding error of a pre-activation, (d + 4) eps (|x - b_pre| |w| + |b_enc|), once for the
    encode's arithmetic and once for this one. Rows with NaN count as active.
    """
    rows = sae.normalize(x)
    centered = rows - sae.b_pre
    weights, bias = sae.W_enc[rule.latents], sae.b_enc[rule.latents]
    pre = torch.addmm(bias, centered, weights.T)
    eps = torch.finfo(sae.dtype).eps
    magnitude = centered.norm(dim=1)[:, None] * weights.norm(dim=1) + bias.abs()
    margin = 2 * (sae.d_model + 4) * eps * magnitude
    bound = rule.gate.to(pre.dtype).clamp(min=0)
    return (~(pre + margin <= bound)).any(1)
