"""Weights set to zero while the pipeline runs, and put back to the bit: what ablating components is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number
from sparsefeat.pipeline import Context, resolve
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.pipeline.weights import plain_weight
from sparsefeat.steering.saved import SavableInstrument, register


@register("sparsefeat.attribution:WeightMask")
class WeightMask(SavableInstrument):
    """Instrument: chosen weights of Linear and Conv2d modules are 0 while it is attached. Made by `cad_erase`,
    `cad_amplify`, `cones`, or from masks of your own.

    A weight is the same for all rows, so there is no `condition`. Several masks on one module are all in; leaving the session
    puts back the bits that were there, in whatever order sessions end. A pipeline that is saved inside the session is saved
    with the weights at 0.

    Args:
        masks: path of a module -> bool of its weight's shape, True where the weight becomes 0.
        concept: a name, for the record.
        steps: window of steps as in `Steer`; default all.

    Raises:
        ValueError: a mask that is no tensor of booleans; none of them zeroes anything.
    """

    def __init__(self, masks: Mapping[str, Tensor], concept: str = "", *, steps: Steps = None):
        if not isinstance(masks, Mapping) or not masks:
            raise ValueError(f"masks={masks!r:.60} must map at least one module's path to a mask of its weight.")
        for path, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim not in (2, 4):
                raise ValueError(
                    f"masks[{path!r}] must be a tensor of booleans of the weight's shape, True where it becomes 0; it is "
                    f"{f'{mask.dtype} {list(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__}."
                )
        self.shapes: dict[str, tuple[int, ...]] = {path: tuple(mask.shape) for path, mask in masks.items()}
        self.zeroed: dict[str, Tensor] = {
            path: mask.detach().cpu().flatten().nonzero()[:, 0] for path, mask in masks.items()
        }
        if not any(len(zeroed) for zeroed in self.zeroed.values()):
            raise ValueError("masks= zero no weight at all, so nothing would change; choose more weights.")
        self.concept: str = str(concept)
        self.window: StepWindow = StepWindow.parse(steps)

    @property
    def n_zeroed(self) -> int:
        """How many weights become 0."""
        return sum(map(len, self.zeroed.values()))

    def mask(self, path: str) -> Tensor:
        """bool of the weight's shape, True where it becomes 0."""
        flat = torch.zeros(self.shapes[path], dtype=torch.bool).flatten()
        flat[self.zeroed[path]] = True
        return flat.reshape(self.shapes[path])

    def union(self, later: WeightMask) -> WeightMask:
        """What either of them zeroes, in this one's steps (Cones' way to erase several concepts).

        Raises:
            TypeError: `later` is no WeightMask.
            ValueError: it is of another model.
        """
        if not isinstance(later, WeightMask):
            raise TypeError(f"later is {type(later).__name__}, not a WeightMask; make one, cad_erase(...).")
        masks = {path: self.mask(path) for path in self.shapes}
        for path in later.shapes:
            if self.shapes.get(path, later.shapes[path]) != later.shapes[path]:
                raise ValueError(
                    f"later is of another model: {path} is {later.shapes[path]}, here {self.shapes[path]}."
                )
            masks[path] = masks[path] | later.mask(path) if path in masks else later.mask(path)
        both = WeightMask(masks, ", ".join(name for name in (self.concept, later.concept) if name))
        vars(both)["window"] = self.window
        return both

    def weights(self, pipe: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        return {path: self._change(pipe, path) for path in self.shapes}

    def _change(self, pipe: Any, path: str) -> Callable[[Tensor], Tensor]:
        found = tuple(plain_weight(resolve(pipe, path)).shape)
        if found != self.shapes[path]:
            raise ValueError(
                f"the weight of {path} is {list(found)} in this {type(pipe).__name__}, the mask {list(self.shapes[path])}: it "
                "was made for another model."
            )
        zeroed = self.zeroed[path]

        def ablated(weight: Tensor) -> Tensor:
            return weight.flatten().index_fill(0, zeroed.to(weight.device), 0).reshape(weight.shape)

        return ablated

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"concept": self.concept, "shapes": {path: list(shape) for path, shape in self.shapes.items()}}, dict(
            self.zeroed
        )

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> WeightMask:
        masks = {}
        for path, shape in config["shapes"].items():
            mask = torch.zeros(tuple(shape), dtype=torch.bool)
            mask.view(-1)[tensors[path]] = True
            masks[path] = mask
        return cls(masks, config["concept"])

    def __repr__(self) -> str:
        return f"WeightMask({self.concept}: {self.n_zeroed:,} weights of {len(self.shapes)} modules)"


RULES = ("positive", "negative", "both")


def chosen_weights(scores: Tensor, ratio: float, rule: str = "positive", *, per_row: bool = True) -> Tensor:
    """bool like `scores [out, ...]`: the weights that CAD zeroes.

    Of every row of n scores the floor(ratio n) highest, if above 0 ("positive"), as many of the lowest, if below 0
    ("negative"), or both. A row shorter than 1 / ratio loses nothing. `per_row=False` takes the whole matrix for one row.
    """
    number("ratio", ratio, 0, 1)
    finite("scores", scores)
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; use one of {', '.join(map(repr, RULES))}.")
    rows = scores.flatten(1) if per_row else scores.reshape(1, -1)
    chosen = torch.zeros_like(rows, dtype=torch.bool)
    n = int(ratio * rows.shape[1])
    if rule != "negative":
        chosen |= torch.zeros_like(chosen).scatter_(1, rows.topk(n, 1).indices, True) & (rows > 0)
    if rule != "positive":
        chosen |= torch.zeros_like(chosen).scatter_(1, rows.topk(n, 1, largest=False).indices, True) & (rows < 0)
    return chosen.reshape(scores.shape)
