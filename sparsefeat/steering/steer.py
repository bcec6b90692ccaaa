"""Steer: add, scale, set or clamp latents of an SAE while a pipeline runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import image_map, mask_map, no_entry, number
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.pipeline import Activations, Call, Context, Delta, Hookpoint
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.code_rule import CodeRule, code_edit
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.where import (
    GivenMask,
    Mask,
    check_condition,
    condition_signs,
    map_of_rows,
    mask_of_rows,
)


@register("sparsefeat.steering:Steer")
class Steer(SavableInstrument):
    """Instrument: edits of chosen latents, added to the block's output (the SAE's error is kept).

    For every row of weight w = sign(condition) x mask:

        x' = x + w sum over latents of (add + add_map at the row's position) W_dec[latent]
               + w sum over latents of (z' - z) W_dec[latent],   z' from z by scale, set and clamp.

    Of a transcoder, which reads a module's input and writes its output, the code is taken at the input (`at` ends in
    `:input`) and the change is added to the output of the same run.

    A latent is given by its number, or by its name where the SAE has names (`sae.names`).

    Args:
        sae: whose latents. A standardising SAE's edits are multiplied by the row's scale (`SAE.row_scale`).
        add: latent -> amount, added whether the latent is active or not; never encodes.
        add_map: latent -> map of amounts [H, W] (or [images, H, W]), resized to the grid: by area to a coarser one,
            bilinearly to a finer one; a painted mask times the latent's usual activation, for one. Never encodes.
        scale: latent -> factor of its activation (0 removes it, negative turns it round).
        set: latent -> value it gets at every position.
        clamp: latent -> (low, high) that its activation, scaled if it is also in `scale`, is held between; None for no
            bound. A low above 0 raises it at every position.
        steps: (start, stop) fractions of the schedule, or a list of step indices; default all.
        mask: weights [H, W] (or [images, H, W]), resized to the grid, or a callable of the `Context` that returns them
            ([H, W] or one map for each batch row), e.g. `HeatMaps.mask("fox")`.
        condition: "cond" (default), "uncond", "cond+uncond-" (added to the conditional half, subtracted from the
            unconditional one) or "both" (added to every row). Without guidance all rows are conditional.
        at: hookpoint; default the SAE's.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name; nothing to edit; a latent that the SAE has not, or in two
            edits that exclude each other.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        add: Mapping[Any, float] | None = None,
        add_map: Mapping[Any, Any] | None = None,
        scale: Mapping[Any, float] | None = None,
        set: Mapping[Any, float] | None = None,
        clamp: Mapping[Any, tuple[float | None, float | None]] | None = None,
        steps: Steps = None,
        mask: GivenMask = None,
        condition: str = "cond",
        at: str | Hookpoint | None = None,
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        edits: dict[str, Any] = {"add": add, "add_map": add_map, "scale": scale, "set": set, "clamp": clamp}
        edits = {name: _by_number(name, edit, sae) for name, edit in edits.items()}
        for name, edit in edits.items():
            _check_latents(name, edit, sae.n_latents)
        add, add_map, scale, set, clamp = (_plain(edit) for edit in edits.values())
        if not any(edits.values()):
            raise ValueError("this Steer edits nothing; give at least one latent, as in add={12: 8.0}.")
        self.sae = sae
        self.add: dict[int, float] = {i: number(f"add[{i}]", amount) for i, amount in add.items()}
        self.add_map: dict[int, Tensor] = {i: image_map(f"add_map[{i}]", given) for i, given in add_map.items()}
        self.rule: CodeRule = _rule(scale, set, clamp)
        self.writes: Hookpoint = _written(sae, self.at, len(self.rule) > 0)
        self.window: StepWindow = StepWindow.parse(steps)
        self.mask: Mask = mask if mask is None or callable(mask) else mask_map("mask", mask)
        self.condition: str = check_condition(condition)
        self._n_images: int | None = None
        self._change: Tensor | None = None
        self._weighed, self._moved = False, torch.tensor(False)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,) if self.writes == self.at else (self.at, self.writes)

    def begin_call(self, call: Call) -> None:
        self._n_images = call.n_images
        self._change = None
        self._weighed, self._moved = False, torch.tensor(False)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def idle(self) -> str | None:
        if not self._weighed:
            return "its mask is 0 wherever it acts: look at its mask="
        free = (self.rule.offset == 0) & (self.rule.low == -math.inf) & (self.rule.high == math.inf)
        scaled = self.rule.latents[free & (self.rule.gain != 1)].tolist()
        if self.add or self.add_map or len(scaled) < len(self.rule) or self._moved:
            return None
        return (
            f"of its latents, {', '.join(map(str, scaled[:5]))}{', …' if len(scaled) > 5 else ''}, none is active where it "
            "acts, and what is not there can be neither scaled nor set to 0: take latents that `top` lists, or add="
        )

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        if context.hookpoint == self.writes != self.at:  # of the run whose input was just seen
            change, self._change = self._change, None
            return None if change is None else Delta(change)
        change = self._change_of(activations, context)
        if self.writes != self.at:
            self._change = change
            return None
        return None if change is None else Delta(change)

    def _change_of(self, activations: Activations, context: Context) -> Tensor | None:
        """[rows, d_model], what the edits add where the SAE writes."""
        x = activations.rows
        beside(self.sae, activations, context)
        weight = row_weights(self.condition, self.mask, context, len(x), self._n_images)
        self._weighed = self._weighed or bool(weight.any())
        change = code_edit(activations, self.sae, self.rule, weight) if len(self.rule) else None
        if change is not None and not (change.device.type == "cpu" and self._moved):  # elsewhere, asking would wait
            self._moved = self._moved.to(change.device) | change.any()
        if self.add or self.add_map:
            added = self._added(activations, context, weight)
            change = added if change is None else change + added
        return change

    def _added(self, activations: Activations, context: Context, weight: Tensor) -> Tensor:
        """What `add` and `add_map` add, [rows, d_model] fp32: an outer product each, or one for all constants."""
        x = activations.rows
        scale = self.sae.row_scale(x)
        if scale is not None:
            weight = weight * scale[:, 0].to(weight)
        weight = weight.to(x.device)
        parts = []
        if self.add:
            amounts = torch.tensor(list(self.add.values()), dtype=torch.float32, device=x.device)
            parts.append(weight[:, None] * (amounts @ self._directions(list(self.add), x.device)))
        if self.add_map:
            maps = [
                map_of_rows(f"add_map[{i}]", given, context, self._n_images).reshape(-1)
                for i, given in self.add_map.items()
            ]
            amounts = torch.stack(maps, 1).to(x.device, torch.float32) * weight[:, None]
            parts.append(amounts @ self._directions(list(self.add_map), x.device))
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def _directions(self, latents: list[int], device: torch.device) -> Tensor:
        return self.sae.directions(latents).detach().to(device, torch.float32)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if callable(self.mask) and not isinstance(self.mask, Tensor):
            raise ValueError("a Steer whose mask is a callable cannot be saved; give the mask as a tensor.")
        tensors = {f"add_map.{i}": given for i, given in self.add_map.items()}
        if isinstance(self.mask, Tensor):
            tensors["mask"] = self.mask
        tensors |= {f"rule.{name}": getattr(self.rule, name) for name in _RULE_FIELDS}
        return {"add": [[i, amount] for i, amount in self.add.items()]}, tensors

    @classmethod
    def from_saved(cls, sae: SAE, config: dict[str, Any], tensors: dict[str, Tensor]) -> Steer:
        steer = cls(sae, add={0: 0.0}, condition=config["condition"], at=config["at"])
        add = {int(i): float(amount) for i, amount in config["add"]}
        add_map = {int(k.removeprefix("add_map.")): t for k, t in tensors.items() if k.startswith("add_map.")}
        rule = CodeRule(**{name: tensors[f"rule.{name}"] for name in _RULE_FIELDS})
        for name, latents in (("add", add), ("add_map", add_map), ("rule", rule.latents.tolist())):
            _check_latents(name, dict.fromkeys(latents), sae.n_latents)
        writes = _written(sae, steer.at, len(rule) > 0)
        vars(steer).update(add=add, add_map=add_map, rule=rule, mask=tensors.get("mask"), writes=writes)
        return steer


_RULE_FIELDS = ("latents", "gain", "offset", "low", "high", "gate")


def row_weights(condition: str, mask: Mask, context: Context, rows: int, n_images: int | None) -> Tensor:
    """fp32 [rows]: sign of the row's condition times the mask at its position."""
    signs = condition_signs(condition, context)
    weights = signs[:, None].expand(-1, rows // len(signs))
    over_grid = mask_of_rows(mask, context, n_images)
    if over_grid is not None:
        weights = weights * over_grid.to("cpu", torch.float32)
    return weights.reshape(-1)


def _rule(
    scale: Mapping[int, float], set: Mapping[int, float], clamp: Mapping[int, tuple[float | None, float | None]]
) -> CodeRule:
    fields: dict[int, dict[str, float]] = {}
    for latent, factor in scale.items():
        fields[latent] = {"gain": number(f"scale[{latent}]", factor)}
    for latent, value in set.items():
        if latent in fields or latent in clamp:
            raise ValueError(f"latent {latent} is in set= and also in scale= or clamp=; give it one of them.")
        fields[latent] = {"gain": 0.0, "offset": number(f"set[{latent}]", value)}
    for latent, bounds in clamp.items():
        low, high = bounds if isinstance(bounds, (tuple, list)) and len(bounds) == 2 else (math.nan, math.nan)
        low, high = -math.inf if low is None else low, math.inf if high is None else high
        if not all(isinstance(bound, Real) and not isinstance(bound, bool) for bound in (low, high)):
            low, high = math.nan, math.nan
        if not -math.inf <= low <= high or low == math.inf or high == -math.inf:
            raise ValueError(f"clamp[{latent}]={bounds!r} must be (low, high) with low <= high, None for no bound.")
        fields.setdefault(latent, {}).update(low=float(low), high=float(high))
    return CodeRule.build(fields)


def _written(sae: SAE, at: Hookpoint, of_code: bool) -> Hookpoint:
    """Where the edits are added: where they are read, or of a transcoder at its module's input, at the module's output."""
    if sae.config.transcoder and at.io == "input":
        return replace(at, io="output")
    if of_code:
        reconstructing(sae)
    return at


def _by_number(name: str, edit: Any, sae: SAE) -> Any:
    """The edit with its latents' numbers in the place of names."""
    if not isinstance(edit, Mapping) or not any(isinstance(latent, str) for latent in edit):
        return edit
    numbered = {sae.latent(latent): amount for latent, amount in edit.items()}
    if len(numbered) != len(edit):
        raise ValueError(f"{name}={edit!r} names a latent twice: give each once.")
    return numbered


def _check_latents(name: str, edit: Mapping[int, Any] | None, n_latents: int) -> None:
    if edit is None:
        return
    if not isinstance(edit, Mapping):
        raise ValueError(f"{name}={edit!r} must map latents to amounts, as in {name}={{12: 8.0}}.")
    for latent in edit:
        no_entry(f"a latent of {name}=", latent)
        if isinstance(latent, bool) or not hasattr(latent, "__index__") or not 0 <= latent < n_latents:
            raise ValueError(f"{name}= names latent {latent!r}; this SAE has latents 0 to {n_latents - 1}.")


def _plain(edit: Mapping[int, Any] | None) -> dict[int, Any]:
    """By Python's own integers, whatever library's the keys are (a tensor is no key that can be looked up)."""
    return {operator.index(latent): amount for latent, amount in (edit or {}).items()}
