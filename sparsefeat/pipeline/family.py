"""What has to be known about a kind of model to read and edit its blocks. One subclass a model family, each in a file
of its own, listed in `families.py`; this base class is what holds by structure alone (a VAE, an unknown model).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn


class Family:
    """The structural answers: the first tensor of an output, the first argument, the grid of a [B, C, *grid] tensor."""

    stream = "image"
    """The stream of a model that has only one; a joint model goes by the hookpoint's own."""

    runs_in_steps = False
    """Whether the scheduler drives this model. A text encoder and a VAE run outside the steps."""

    never_reached = "it may have been skipped by a cache or replaced after `attach`; attach again after such changes"
    """The likely reason, and the remedy, when a whole call ends without a hookpoint of this family."""

    def claims(self, root: nn.Module) -> bool:
        """Whether this component of a pipeline is of this family."""
        return True

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """(path within the root, kind, module) of every block worth hooking, in the order they run if possible."""
        yield from ()

    def aliases(self, path: str) -> tuple[str, ...]:
        """Other names that library versions gave to the module at `path` (within the root)."""
        return ()

    def output_index(self, module: nn.Module, stream: str) -> int:
        """Which element of the module's output, where that is a tuple, is the stream's tensor."""
        return 0

    def input_name(self, module: nn.Module, stream: str) -> str | None:
        """Which argument of the module's forward is the stream's tensor; None is the first."""
        return None

    def width(self, module: nn.Module, io: str) -> int | None:
        """d_model of the module's "output" or "input", None where only running it would tell."""
        return None

    def grid(self, arguments: Mapping[str, Any], shape: Sequence[int]) -> tuple[int, ...] | None:
        """The positions' grid of a tensor of this shape, (h, w) or (frames, h, w).

        `arguments` are those of the root's forward in the run that is going on. None where positions have no grid.
        """
        return tuple(shape[2:]) if len(shape) > 3 else None
