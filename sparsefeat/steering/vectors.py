"""AddVector: a direction added to what a module gives, everywhere or with a place in the image, the same or by time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import kept, mask_map, number
from sparsefeat.pipeline import Activations, Call, Context, Delta, Hookpoint
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.first_visits import check_place
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.where import GivenMask, Mask, check_condition, condition_signs, mask_of_rows


@register("sparsefeat.steering:AddVector")
class AddVector(SavableInstrument):
    """Instrument: x' = x + strength v, at every position of the chosen rows.

    Args:
        at: hookpoint, as in "unet.mid_block" (the h-space).
        vector: v, `[d_model]`, or `[d_model, height, width]` for a value of its own at every position (resized bilinearly to
            another grid). A dimension of bins before either splits the schedule into as many equal parts.
        strength: factor; below 0 turns it round.
        steps, mask, condition: as in `Steer`.

    Raises:
        TypeError: `vector` is no tensor.
        ValueError: an argument that cannot be, by its name; numbers that are not finite.
    """

    def __init__(
        self,
        at: str | Hookpoint,
        vector: Tensor,
        strength: float = 1.0,
        *,
        steps: Steps = None,
        mask: GivenMask = None,
        condition: str = "cond",
    ):
        if not isinstance(vector, Tensor):
            raise TypeError(f"vector is {type(vector).__name__}, not a tensor; give torch.as_tensor(vector).")
        if vector.ndim not in (1, 2, 3, 4) or not vector.numel():
            raise ValueError(
                f"vector has shape {list(vector.shape)}; give [d_model] or [d_model, height, width], with a "
                "dimension of bins before it if it changes with time."
            )
        self.at: Hookpoint = check_place(at)
        self.vectors: Tensor = kept("vector", vector if vector.ndim in (2, 4) else vector[None])
        """[bins, d_model] or [bins, d_model, height, width]."""
        self.strength: float = number("strength", strength)
        self.window: StepWindow = StepWindow.parse(steps)
        self.mask: Mask = mask if mask is None or callable(mask) else mask_map("mask", mask)
        self.condition: str = check_condition(condition)
        self._n_images: int | None = None

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return self.vectors.shape[1]

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def begin_call(self, call: Call) -> None:
        self._n_images = call.n_images

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        x = activations.tensor
        bins = len(self.vectors)
        if bins > 1 and context.fraction is None:
            raise ValueError(
                f"{self.at} runs before the schedule, in which {bins} vectors by time mean nothing; give one."
            )
        vector = self.vectors[bin_of(context, bins)].to(x.device, torch.float32)
        if vector.ndim == 3:
            if context.grid is None:
                raise ValueError(
                    f"{self.at} has no image grid, for which this vector has values; give one of [d_model]."
                )
            vector = _on_grid(vector, context.grid)  # [positions, d_model]
        weights = condition_signs(self.condition, context)[:, None]
        mask = mask_of_rows(self.mask, context, self._n_images)
        weights = (weights if mask is None else weights * mask).to(vector)
        rows = weights.expand(-1, context.positions)[..., None] * vector * self.strength
        return Delta(rows.flatten(0, 1))

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if callable(self.mask) and not isinstance(self.mask, Tensor):
            raise ValueError("an AddVector whose mask is a callable cannot be saved; give the mask as a tensor.")
        tensors = {"vectors": self.vectors.detach()}
        return {"strength": self.strength}, tensors if self.mask is None else {**tensors, "mask": self.mask}

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> AddVector:
        return cls(vector=tensors["vectors"], mask=tensors.get("mask"), **config)


def bin_of(context: Context, bins: int) -> int:
    """Which of so many equal parts of the schedule it is."""
    return min(int((context.fraction or 0.0) * bins + 1e-6), bins - 1)


def _on_grid(vector: Tensor, grid: tuple[int, ...]) -> Tensor:
    """[d, h, w] as [positions, d] of a grid (h, w) or (frames, h, w), whose frames share it."""
    if tuple(vector.shape[1:]) != grid[-2:]:
        vector = F.interpolate(vector[None], size=grid[-2:], mode="bilinear", align_corners=False)[0]
    rows = vector.flatten(1).T
    return rows.repeat(grid[0], 1) if len(grid) == 3 else rows
