"""Replace where a latent fires: positions that a latent finds get another position's activations, or the unconditional's.

The latent is a detector alone: what its direction is does not matter, nor whether the SAE explains the rest of the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import number
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register

SOURCES = ("patch", "uncond")


@register("sparsefeat.erasure:ReplaceWhere")
class ReplaceWhere(SavableInstrument):
    """Instrument: where one of the latents is active above its threshold, the row becomes another's.

    Args:
        sae: whose latents detect.
        latents: latent, or name of one -> threshold of its activation, 0 for any.
        source: "patch": the nearest position of the same image where none of them fires (of equally near ones the first in
            reading order); an image in which they fire everywhere is left as it is. "uncond": the same position under the
            unconditional prompt, which has to be in the same run of the denoiser.
        condition: rows that are looked at and replaced, "cond" or, with source="patch", "uncond" or "both".
        steps, at: as in `Steer`.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name; a latent that the SAE has not.
    """

    def __init__(
        self,
        sae: SAE,
        latents: Mapping[int | str, float],
        *,
        source: str = "patch",
        condition: str = "cond",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        self.sae = sae
        if not isinstance(latents, Mapping) or not latents:
            raise ValueError(f"latents={latents!r} must map at least one latent to its threshold, as in {{12: 0.0}}.")
        self.latents: dict[int, float] = {
            sae.latent(i): number(f"latents[{i!r}]", threshold, 0) for i, threshold in latents.items()
        }
        sae.directions(list(self.latents))  # names a latent that does not exist
        if source not in SOURCES:
            raise ValueError(f"source={source!r} is not known; use 'patch' or 'uncond'.")
        allowed = ("cond",) if source == "uncond" else ("cond", "uncond", "both")
        if condition not in allowed:
            raise ValueError(
                f"condition={condition!r} with source={source!r} must be {' or '.join(map(repr, allowed))}."
            )
        self.source = source
        self.condition: str = condition
        self.window: StepWindow = StepWindow.parse(steps)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def conditions(self) -> tuple[str, ...] | None:
        return ("cond", "uncond") if self.source == "uncond" else super().conditions()

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        x = activations.rows
        chosen = torch.ones(len(x), dtype=torch.bool, device=x.device)
        if self.condition != "both":
            chosen = context.row_condition(self.condition)
        if not bool(chosen.any()):
            return None
        code = activations.code(beside(self.sae, activations, context))
        thresholds = torch.tensor(list(self.latents.values()), dtype=torch.float32, device=x.device)
        fires = (code.select(list(self.latents)) > thresholds).any(1)
        wanted = (fires & chosen).nonzero()[:, 0]
        if not len(wanted):
            return None
        if self.source == "uncond":
            taken = unconditional_rows(wanted, context, otherwise="use source='patch', or ")
        else:
            taken = self._patch(wanted, fires, context)
        wide = torch.promote_types(x.dtype, torch.float32)
        change = torch.zeros(x.shape, dtype=wide, device=x.device)
        change[wanted] = x[taken].to(wide) - x[wanted].to(wide)
        return Delta(change)

    @staticmethod
    def _patch(wanted: Tensor, fires: Tensor, context: Context) -> Tensor:
        """The row that each takes, itself where its image has no other."""
        grid = context.grid or (context.positions,)
        if torch.Size(grid).numel() != context.positions:
            grid = (context.positions,)
        places = torch.cartesian_prod(*(torch.arange(n, device=wanted.device) for n in grid)).reshape(
            context.positions, -1
        )
        taken = wanted.clone()
        for entry in torch.unique(wanted // context.positions).tolist():
            first = entry * context.positions
            free = (~fires[first : first + context.positions]).nonzero()[:, 0]
            if len(free):
                mine = (wanted // context.positions == entry).nonzero()[:, 0]
                apart = torch.cdist(places[wanted[mine] - first].double(), places[free].double())
                taken[mine] = first + free[_first_smallest(apart)]
        return taken

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"latents": [[i, threshold] for i, threshold in self.latents.items()], "source": self.source}, {}

    @classmethod
    def from_saved(cls, sae: SAE, config: dict[str, Any], tensors: dict[str, Tensor]) -> ReplaceWhere:
        return cls(sae, {int(i): float(threshold) for i, threshold in config.pop("latents")}, **config)


def unconditional_rows(rows: Tensor, context: Context, otherwise: str = "") -> Tensor:
    """int64, for each of these rows of conditional entries the row at the same position of the same image's unconditional one.

    `otherwise`: what else could be done, for the error.

    Raises:
        ValueError: a conditional entry's image has none in this run of the denoiser.
    """
    row_of = {image: row for row, (condition, image) in enumerate(context.entries) if condition == "uncond"}
    missing = [image for condition, image in context.entries if condition == "cond" and image not in row_of]
    if missing:
        raise ValueError(
            f"the run of the denoiser at {context.hookpoint} has no unconditional rows beside the prompt's (guidance is off, "
            f"or it is a run of its own); {otherwise}turn guidance on in a pipeline that runs both at once."
        )
    images = torch.tensor([row_of.get(image, 0) for _, image in context.entries], device=rows.device)
    return images[rows // context.positions] * context.positions + rows % context.positions


def _first_smallest(apart: Tensor) -> Tensor:
    """[rows], the first column of the smallest value; distances on a grid are equal to rounding or clearly apart."""
    return (apart <= apart.amin(1, keepdim=True) + 1e-9).to(torch.uint8).argmax(1)
