"""Concept Lancet: a concept taken out of what a layer says, by its share in a sparse sum of named directions.

Luo et al. (arXiv 2504.02828): x ~ sum_j w_j a_j over a dictionary of concept directions a_j, few w_j not 0; then

    x' = x - strength w_r (a_r - a_s)        r the concept to remove, s what stands in its place, if anything

so that a concept that is hardly there is hardly moved. Here w >= 0 by gradient pursuit (the paper's is an elastic net), on unit
directions, in every row by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sparsefeat_kernels import matching_pursuit
from torch import Tensor

from sparsefeat.arguments import finite, kept, number, whole
from sparsefeat.features.collecting import check_prompts
from sparsefeat.features.prompts import layer_outputs_and_tokens
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.steer import row_weights
from sparsefeat.steering.where import check_condition


@register("sparsefeat.erasure:ConceptLancet")
class ConceptLancet(SavableInstrument):
    """Instrument: one named direction's share is taken out of every row, or becomes another's.

    Args:
        directions: concept -> direction [d_model], of any length; more concepts than the two make the shares sharper.
        remove: the concept that goes.
        add: the concept that stands in its place; default none.
        at: hookpoint of the rows.
        k: at most how many directions a row is a sum of.
        strength: 1 takes the whole share.
        center: [d_model] subtracted from rows before they are decomposed; `fit` gives the mean.
        condition, steps: as in `Steer`.

    Raises:
        ValueError: an argument that cannot be, by its name; directions that are zero or not of one width.
    """

    def __init__(
        self,
        directions: Mapping[str, Tensor],
        remove: str,
        add: str | None = None,
        *,
        at: str | Hookpoint,
        k: int = 4,
        strength: float = 1.0,
        center: Tensor | None = None,
        condition: str = "cond",
        steps: Steps = None,
    ):
        if not isinstance(directions, Mapping) or len({tuple(d.shape) for d in directions.values()}) != 1:
            raise ValueError("directions must map concepts to vectors of one length, as ConceptLancet.fit makes them.")
        for name, direction in directions.items():
            if finite(f"directions[{name!r}]", direction).ndim != 1 or not bool(direction.any()):
                raise ValueError(f"directions[{name!r}] must be a vector [d_model] that is not zero.")
        for argument, named in (("remove", remove), ("add", add)):
            if named not in directions and not (argument == "add" and named is None):
                raise ValueError(f"{argument}={named!r} is no direction; there are {', '.join(map(repr, directions))}.")
        if remove == add:
            raise ValueError(f"add={add!r} is what remove= takes out; name another, or none.")
        self.names: tuple[str, ...] = tuple(directions)
        self.remove: str = remove
        self.add: str | None = add
        stacked = torch.stack([directions[name].detach().float().cpu() for name in self.names])
        self.atoms: Tensor = stacked / stacked.norm(dim=1, keepdim=True)
        width = self.atoms.shape[1]
        self.center: Tensor = (
            torch.zeros(width, dtype=torch.float32) if center is None else kept("center", center).detach().float().cpu()
        )
        if self.center.shape != (width,):
            raise ValueError(f"center has shape {list(self.center.shape)}; the directions are [{width}].")
        self.at: Hookpoint = Hookpoint.parse(at) if isinstance(at, str) else at
        self.k: int = min(whole("k", k), len(self.names))
        self.strength: float = number("strength", strength)
        self.condition: str = check_condition(condition)
        self.window: StepWindow = StepWindow.parse(steps)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        at: str | Hookpoint,
        prompts: Mapping[str, Sequence[str]],
        remove: str,
        add: str | None = None,
        **options: Any,
    ) -> ConceptLancet:
        """Directions from a layer of a text encoder: the mean of each concept's own tokens, less the mean of all concepts.

        Args:
            at: a layer of a text encoder, as in "text_encoder.encoder.layers.0".
            prompts: concept -> its prompts, at least two concepts.
            options: k, strength, condition, steps.

        Raises:
            ValueError: fewer than two concepts, or one without prompts; a hookpoint that is not there.
        """
        check_prompts(prompts)
        if len(prompts) < 2:
            raise ValueError(
                f"prompts={list(prompts)} must have at least two concepts, whose difference is a direction."
            )
        where = Hookpoint.parse(at) if isinstance(at, str) else at
        cls(
            {c: torch.ones(1, dtype=torch.float32) for c in prompts}, remove, add, at=where, **options
        )  # refused before the prompts are encoded
        means = {}
        for concept, its in prompts.items():
            found = layer_outputs_and_tokens(pipe, where, list(its), {})
            means[concept] = torch.stack([rows[own.start : own.stop].double().mean(0) for rows, own in found]).mean(0)
        center = torch.stack(list(means.values())).mean(0)
        directions = {concept: (mean - center).float() for concept, mean in means.items()}
        return cls(directions, remove, add, at=where, center=center.float(), **options)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def expected_width(self, hookpoint: Hookpoint) -> int:
        return self.atoms.shape[1]

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def shares(self, rows: Tensor) -> Tensor:
        """[rows, concepts], w of each; rows [rows, d_model]. Where gradients are on, theirs is that of the least squares on the
        directions that were chosen: choosing has none.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        atoms = self.atoms.to(rows.device, wide)
        centred = rows.to(wide) - self.center.to(rows.device, wide)
        with torch.no_grad():
            values, indices = matching_pursuit(centred, atoms, self.k, nonnegative=True)
        if centred.requires_grad:
            free = _least_squares(centred, atoms[indices.long()], values > 0)
            values = values + free - free.detach()
        return values.new_zeros(len(rows), len(atoms)).scatter_add(1, indices.long(), values)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        rows = activations.rows
        atoms = self.atoms.to(rows.device)
        towards = -atoms[self.names.index(self.remove)]
        if self.add is not None:
            towards = towards + atoms[self.names.index(self.add)]
        share = self.shares(rows)[:, self.names.index(self.remove)]
        weights = row_weights(self.condition, None, context, len(rows), 0).to(share)
        return Delta((self.strength * share * weights)[:, None] * towards.to(share))

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {name: getattr(self, name) for name in ("names", "remove", "add", "k", "strength")}
        return config, {"atoms": self.atoms, "center": self.center}

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptLancet:
        directions = dict(zip(config.pop("names"), tensors["atoms"], strict=True))
        loaded = cls(directions, center=tensors["center"], **config)
        vars(loaded)["atoms"] = tensors["atoms"]  # already of unit length: dividing again would change bits
        return loaded


def _least_squares(rows: Tensor, chosen: Tensor, used: Tensor) -> Tensor:
    """[rows, k], the weights of `chosen` [rows, k, d_model] whose sum is nearest to `rows`; 0 where not `used`."""
    chosen = torch.where(used[..., None], chosen, 0)
    unused = torch.diag_embed((~used).to(chosen))
    return torch.linalg.solve(chosen @ chosen.mT + unused, chosen @ rows[..., None])[..., 0]
