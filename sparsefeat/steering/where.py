"""Where and when an edit acts: a window of steps, the rows' conditions, and maps over the image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import image_map
from sparsefeat.pipeline import Call, Context

Steps: TypeAlias = tuple[float, float] | Iterable[int] | None
Mask: TypeAlias = Tensor | Callable[[Context], Tensor] | None

# The factor of a row's edit by its condition. "cond+uncond-" is base_both of sdxl-unbox: guidance then sees the edit
# from both sides.
CONDITIONS: dict[str, dict[str, float]] = {
    "cond": {"cond": 1.0},
    "uncond": {"uncond": 1.0},
    "cond+uncond-": {"cond": 1.0, "uncond": -1.0},
    "both": {},
}


def check_condition(condition: str) -> str:
    if condition not in CONDITIONS:
        raise ValueError(f"condition={condition!r} is not known; use one of {', '.join(map(repr, CONDITIONS))}.")
    return condition


def condition_signs(condition: str, context: Context) -> Tensor:
    """fp32 [batch]: 1, -1 or 0 for each batch row. "both" edits every row, whatever further conditions there are."""
    if condition == "both":
        return torch.ones(len(context.condition))
    signs = CONDITIONS[condition]
    return torch.tensor([signs.get(row, 0.0) for row in context.condition])


@dataclass(frozen=True)
class StepWindow:
    """The steps in which an edit acts: a half-open range of fractions of the schedule, or a set of step indices."""

    fractions: tuple[float, float] | None
    indices: frozenset[int] | None

    @classmethod
    def parse(cls, steps: Steps) -> StepWindow:
        """A tuple is a pair of fractions, (0.0, 0.5) for the first half; a list, set or range holds step indices."""
        if steps is None:
            return cls(None, None)
        if isinstance(steps, tuple):
            numbers = all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in steps)
            if len(steps) != 2 or not numbers or not 0 <= steps[0] < steps[1] <= 1:
                raise ValueError(
                    f"steps={steps!r} must be (start, stop) with 0 <= start < stop <= 1, fractions of the schedule; "
                    "step indices go in a list, steps=[0, 1, 2]."
                )
            return cls((float(steps[0]), float(steps[1])), None)
        try:
            indices = list(steps)
        except TypeError:
            indices = []
        if not indices or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in indices):
            raise ValueError(
                f"steps={steps!r} must be a list of step indices, counted from 0, or a tuple of two fractions, "
                "(0.0, 0.5)."
            )
        return cls(None, frozenset(indices))

    def contains(self, context: Context) -> bool:
        if self.fractions is None and self.indices is None:
            return True
        if context.step is None:
            raise ValueError(
                f"a steps= window means nothing at {context.hookpoint}, which runs before the schedule; leave it out."
            )
        if self.indices is not None:
            return context.step in self.indices
        assert self.fractions is not None
        start, stop = self.fractions
        fraction = context.fraction
        if fraction is None:
            fraction = context.step / (context.n_steps or 1)
        # The fraction a step began at, with room for its rounding: step 3 of 10 lies in (0.3, 0.5) and not in (0, 0.3).
        return start - 1e-6 <= fraction and (fraction < stop - 1e-6 or stop == 1)

    def warn_if_closed(self, acted: bool, call: Call) -> None:
        """Warn at the end of a call of which no step lay in the window."""
        if not acted and call.n_steps is not None:
            said = self.fractions if self.fractions is not None else sorted(self.indices or ())
            warnings.warn(
                f"nothing was edited: steps={said} holds none of the call's {call.n_steps} steps; widen it, or take more "
                "steps",
                stacklevel=2,
            )

    def to_json(self) -> Any:
        if self.fractions is not None:
            return {"fractions": list(self.fractions)}
        return None if self.indices is None else {"indices": sorted(self.indices)}

    @classmethod
    def from_json(cls, saved: Any) -> StepWindow:
        if saved is None:
            return cls(None, None)
        if "fractions" in saved:
            return cls.parse((saved["fractions"][0], saved["fractions"][1]))
        return cls.parse([int(i) for i in saved["indices"]])


def on_grid(maps: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Maps [..., H, W] as [..., positions] of a grid (h, w) or (frames, h, w).

    Made smaller by area (the mean over the pixels of a cell), larger bilinearly; frames share the map.
    """
    height, width = grid[-2:]
    leading = maps.shape[:-2]
    if tuple(maps.shape[-2:]) != (height, width):
        flat = maps.reshape(1, -1, *maps.shape[-2:])
        if maps.shape[-2] >= height and maps.shape[-1] >= width:
            flat = F.interpolate(flat, size=(height, width), mode="area")
        else:
            flat = F.interpolate(flat, size=(height, width), mode="bilinear", antialias=True)
        maps = flat.reshape(*leading, height, width)
    maps = maps.flatten(-2)
    return maps.repeat(*(1 for _ in leading), grid[0]) if len(grid) == 3 else maps


def map_of_rows(name: str, maps: Tensor, context: Context, n_images: int) -> Tensor:
    """An `image_map` as [batch, positions] of this context: each row gets its image's."""
    if context.grid is None:
        raise ValueError(f"{name} needs an image grid, which {context.hookpoint} has not (stream {context.stream!r}).")
    if maps.ndim == 3 and maps.shape[0] != n_images:
        raise ValueError(
            f"{name} has shape {list(maps.shape)}, maps for {maps.shape[0]} images; this call makes {n_images}."
        )
    resized = on_grid(maps, context.grid)
    if maps.ndim == 2:
        return resized.expand(context.batch, -1)
    return resized[list(context.prompt_index)]


def mask_of_rows(mask: Mask, context: Context, n_images: int) -> Tensor | None:
    """[batch, positions] weights of a mask: a checked map, or a callable giving [h, w] or [batch, h, w]."""
    if mask is None:
        return None
    if isinstance(mask, Tensor):
        return map_of_rows("mask", mask, context, n_images)
    given = image_map("the tensor that mask= returned", mask(context))
    if context.grid is None:
        raise ValueError(f"mask needs an image grid, which {context.hookpoint} has not (stream {context.stream!r}).")
    if given.ndim == 3 and given.shape[0] != context.batch:
        raise ValueError(
            f"the tensor that mask= returned has shape {list(given.shape)}; give [height, width] or one map for each "
            f"of the {context.batch} batch rows."
        )
    return on_grid(given, context.grid).expand(context.batch, -1)
