"""Latents that an instrument moves when the denoiser is about to run: it and the scheduler go on from where they are then.

A scheduler that holds its latents on another scale than what it gives the denoiser, z = x / s (Euler's), goes on from
z' = x' / s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

LATENTS = ("sample", "hidden_states")
LAYERS_FIRST = ("encoder_hidden_states_llama3",)
"""Arguments that are [layers, batch, ...]: HiDream's, of a model of as many layers as it likes."""


def latents_argument(arguments: Mapping[str, Any]) -> str:
    """What a denoiser's forward calls the latents."""
    for name in LATENTS:
        if isinstance(arguments.get(name), Tensor):
            return name
    raise ValueError(
        f"the denoiser is given {', '.join(arguments)}, none of which is known to be the latents ({' or '.join(LATENTS)}); "
        "use a pipeline whose denoiser has one of these."
    )


class MovedLatents:
    """The moves of one denoising step, by image."""

    def __init__(self, who: str, pipe: Any, arguments: Mapping[str, Any]):
        self.who: str = who
        self._kinds = type(pipe).__name__, type(getattr(pipe, "scheduler", None)).__name__
        self._factor = _input_factor(pipe, arguments)
        self._moves: dict[int, Tensor] = {}  # in the units of what the denoiser is given
        self._given: dict[int, Tensor] = {}

    def __contains__(self, image: int) -> bool:
        return image in self._moves

    def __bool__(self) -> bool:
        return bool(self._moves)

    def move(self, image: int, before: Tensor, after: Tensor) -> None:
        """The denoiser would have been given `before` for this image, and is to be given `after`."""
        self._moves[image], self._given[image] = after - before, before

    def applied(self, sample: Tensor, images: Sequence[int]) -> Tensor:
        """The denoiser's input with each row moved as its image is."""
        if set(images) - set(self._moves):
            raise ValueError(
                f"{self._kinds[0]} runs the rows without the prompt before those with it, and {self.who} moves "
                "both by what it sees of the second: it cannot guide this pipeline."
            )
        moves = torch.stack([self._moves[image] for image in images])
        return sample + moves.to(sample.dtype)

    def of_the_scheduler(self, sample: Tensor) -> Tensor:
        """The latents that the scheduler is to step from, in the place of `sample`."""
        images = sorted(self._moves)
        given, moves = (torch.stack([of[image] for image in images]) for of in (self._given, self._moves))
        if given.shape != sample.shape:
            raise ValueError(
                f"the scheduler steps from latents {list(sample.shape)} and the denoiser was given {list(given.shape)}: "
                f"{self.who} guides pipelines whose denoiser is given the latents alone."
            )
        wanted = self._factor * sample.double()
        error = (given.double() - wanted).abs().max()
        if float(error) > 0.02 * float(wanted.abs().max()) + 1e-6:
            raise ValueError(
                f"what the denoiser was given is not what {self._kinds[1]} makes of the latents, "
                f"so {self.who} cannot tell how far to move them; guide with another scheduler."
            )
        return (sample.double() + moves.double() / self._factor).to(sample.dtype)


def _input_factor(pipe: Any, arguments: Mapping[str, Any]) -> float:
    """What the scheduler multiplies latents by before the denoiser is given them."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not hasattr(scheduler, "scale_model_input"):
        return 1.0
    timestep = arguments.get("timestep")
    one = torch.ones(1, dtype=torch.float64)
    first = timestep.flatten()[0] if isinstance(timestep, Tensor) and timestep.numel() else timestep
    return float(scheduler.scale_model_input(one, first)[0])


def rows_of_arguments(value: Any, rows: list[int], batch: int) -> Any:
    """A model's arguments for some entries of its batch: every tensor that has the batch first, cut to those rows."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and len(value) == batch else value
    if isinstance(value, Mapping):
        return {
            name: one[:, rows]
            if name in LAYERS_FIRST and isinstance(one, Tensor)
            else rows_of_arguments(one, rows, batch)
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(rows_of_arguments(one, rows, batch) for one in value)
    return value
