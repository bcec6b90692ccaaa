"""What has to be known about a kind of model to read and edit its blocks. One subclass a model family, each in a file
of its own, listed in `registry.py`; this base class is what holds by structure alone (a VAE, an unknown model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsefeat.pipeline.part import Part


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a component: what its forward was given, and the grid that `Family.image_grid` told from it."""

    root: nn.Module
    arguments: Mapping[str, Any]
    grid: tuple[int, ...] | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    """What a family had to wait for the device for, so that it waits once a run."""


class Family:
    """The structural answers: the first tensor of an output, the first argument, the grid of a [B, C, *grid] tensor.

    Paths are within the component ("transformer_blocks.3").
    """

    stream = "image"
    """The stream of a model that has only one; a joint model goes by the hookpoint's own."""

    runs_in_steps = False
    """Whether the scheduler drives this model. A text encoder and a VAE run outside the steps."""

    grid_arguments: tuple[str, ...] = ()
    """The arguments that `image_grid` has to read on the device: it is asked again only when one is another object."""

    never_reached = "it may have been skipped by a cache or replaced after `attach`; attach again after such changes"
    """The likely reason, and the remedy, when a whole call ends without a hookpoint of this family."""

    def claims(self, root: nn.Module) -> bool:
        """Whether this component of a pipeline is of this family."""
        return True

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """(path, kind, module) of every block worth hooking, in the order they run if possible."""
        yield from ()

    def aliases(self, path: str) -> tuple[str, ...]:
        """Other names that library versions gave to the module at `path`."""
        return ()

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        """The streams that this module's output has: one, or ("image", "text") in a joint model's block."""
        return (self.stream,)

    def stream_at(self, path: str, module: nn.Module, wanted: str) -> str | None:
        """The stream that a hookpoint asking for `wanted` means here; None if there is no such stream.

        Where a model has only one, that is meant whatever was asked for.
        """
        return self.stream

    def output_part(self, path: str, stream: str, output: Any, run: Run) -> Part:
        """Where the stream's tensor is in the module's output."""
        return Part()

    def input_part(self, path: str, stream: str, given: Callable[[str | None], Any], run: Run) -> Part:
        """Where it is in what the module is given. `given(name)` is an argument's value, `given(None)` the first's."""
        return Part()

    def attention_streams(self, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        """Which of a joint attention's queries are which stream's, as (start, stop); empty for any other attention."""
        return {}

    def width(self, module: nn.Module, io: str) -> int | None:
        """d_model of the module's "output" or "input", None where only running it would tell."""
        return None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The grid, (h, w) or (frames, h, w), of the positions the model works on at its finest.

        `arguments` are those of its forward, by name.
        """
        return None

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The grid of the positions of an image tensor of this shape: a feature map [B, C, *grid] carries it. None
        where positions have no grid.
        """
        return tuple(shape[2:]) if len(shape) > 3 else None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        """The grid at the pipeline's default size, where the configs tell it without a run."""
        return None
