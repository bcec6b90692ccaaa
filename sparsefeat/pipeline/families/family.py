"""What has to be known about a kind of model to read and edit its blocks. One subclass a model family, each in a file
of its own, listed in `registry.py`.

A family says of every module which rows of its tensors are which stream's, by the module's path, and checks what it says
against the tensor that is there: as many rows as the model's own arguments make it, or an `UnknownRowsError`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.outputs import element
from sparsefeat.pipeline.part import Part

Rows = tuple[int | tuple[int, ...], int | None]
"""(start, length) of a stream's rows, as in `Part`; length None is the whole tensor."""


TIMES = ("timestep", "timesteps", "t", "timestep_ratio", "sigma", "sigmas", "decoder_noise_time")
"""What a model that is run for a time step calls it, in its forward."""


@dataclass(frozen=True)
class TextLayout:
    """At which of a model's text keys the tokens of which text encoder stand.

    `encoders` one after the other, those in one tuple at the same keys. `before`: keys before them that belong to no
    token. `dropped`: the ids of a template at the beginning that are left out. `packed`: ids that the attention mask
    leaves out are left out here too. `more`: keys may follow that belong to no token.
    """

    encoders: tuple[tuple[str, ...], ...] = (("text_encoder",),)
    before: int = 0
    dropped: int = 0
    packed: bool = False
    more: bool = False


class UnknownRowsError(ValueError):
    """Which rows of a tensor are the image's, or the text's, cannot be told, and nobody has said it."""

    def __init__(self, path: str, module: nn.Module, why: str):
        super().__init__(
            f"which rows of {path or 'the model itself'} ({type(module).__name__}) are which stream's cannot be told, as {why}: take a place "
            "that sparsefeat.hookpoints(pipe) lists, or state the rows of [batch, rows, width], as in "
            "Hookpoint(path, rows=(0, 256))"
        )


def timestep_in(arguments: Mapping[str, Any]) -> Any:
    """The time among the arguments of a model's forward."""
    return next((arguments[name] for name in TIMES if arguments.get(name) is not None), None)


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a component: what its forward was given, and the grid that `Family.image_grid` told from it."""

    root: nn.Module
    arguments: Mapping[str, Any]
    grid: tuple[int, ...] | None = None

    @property
    def timestep(self) -> Any:
        """The time that the model was given, None if it takes none."""
        return timestep_in(self.arguments)


@dataclass(frozen=True)
class Extent:
    """How the rows of a tensor are shared out: `batch` entries of `positions` rows each, and the grid of those."""

    batch: int
    positions: int
    grid: tuple[int, ...] | None


class Family:
    """What holds until a family says otherwise. Paths are within the component ("transformer_blocks.3")."""

    classes: tuple[str, ...] = ()
    """Names of the model's classes in diffusers. They go by name, so that no version of diffusers must have them."""

    stream = "image"
    """The stream of a model that has only one; a joint model goes by the hookpoint's own."""

    runs_in_steps = False
    """Whether the scheduler drives this model. A text encoder and a VAE run outside the steps."""

    turns_queries = False
    """Whether the queries of its joint attentions pass through a rotary embedding."""

    makes_embeddings = False
    """Whether the denoiser may be given what it makes of the prompts: a text encoder, or what lies behind one."""

    never_reached = "it may have been skipped by a cache or replaced after `attach`; attach again after such changes"
    """The likely reason, and the remedy, when a whole call ends without a hookpoint of this family."""

    stated_rows: tuple[int, int | None] | None = None
    """The rows that a hookpoint states itself, [start, stop) of a sequence."""

    def claims(self, root: nn.Module) -> bool:
        """Whether this component of a pipeline is of this family. A subclass of a user's is what it is made of, but one
        of diffusers' own is another model (DreamLite's UNet sees a reference image beside the one that is made).
        """
        return self.names(type(root))

    def names(self, kind: type[nn.Module]) -> bool:
        """Whether `classes` has it, as `claims` says."""
        names = [cls.__name__ for cls in kind.__mro__]
        own = [cls.__name__ for cls in kind.__mro__ if cls.__module__.startswith("diffusers.models.")]
        return any(name in self.classes for name in own[:1] or names)

    def stating(self, rows: tuple[int, int | None] | None) -> Family:
        """This family, for a hookpoint that states its rows."""
        if rows is None:
            return self
        family = copy.copy(self)
        family.stated_rows = rows
        return family

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

        "image" is also what nobody asked for: where a module has only another stream, that one is meant.
        """
        if self.stated_rows is not None:
            return wanted
        streams = self.streams(path, module)
        return wanted if wanted in streams else streams[0] if wanted == "image" else None

    def output_part(self, path: str, stream: str, output: Any, run: Run) -> Part | None:
        """Where the stream's tensor is in the module's output. None: the module ran on another stream this time."""
        index = self.output_element(path, stream, output, run)
        apart = isinstance(output, (tuple, list)) and len(output) > 1
        rows = self._told(path, stream, element(output, index), run, apart)
        return None if rows is None else Part(index, None, *rows)

    def input_part(self, path: str, stream: str, given: Callable[[str | None], Any], run: Run) -> Part | None:
        """Where it is in what the module is given. `given(name)` is an argument's value, `given(None)` the first's."""
        name, apart = self.input_argument(path, stream, given)
        rows = self._told(path, stream, given(name), run, apart)
        return None if rows is None else Part(0, name, *rows)

    def _told(self, path: str, stream: str, tensor: Any, run: Run, apart: bool) -> Rows | None:
        if not isinstance(tensor, torch.Tensor):
            return 0, None  # taking it out will say so
        if self.stated_rows is not None:
            start, stop = self.stated_rows
            rows = tensor.shape[1] if tensor.ndim == 3 else 0
            if not start < (rows if stop is None else stop) <= rows:
                raise UnknownRowsError(
                    path,
                    run.root,
                    f"it has the shape {list(tensor.shape)}, in which the rows {start} to {stop} are not",
                )
            return start, (rows if stop is None else stop) - start
        return self.rows(path, stream, tensor, run, apart)

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        """Which element of an output that is a tuple is the stream's."""
        return 0

    def input_argument(self, path: str, stream: str, given: Callable[[str | None], Any]) -> tuple[str | None, bool]:
        """The name of the stream's argument (None: the first), and whether the other stream is an argument of its own."""
        return None, False

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        """The stream's rows in a tensor that this module took or gave; None where a module that is run once for each
        stream ran on another one. `apart`: a tuple had the other stream beside it.

        Raises UnknownRowsError where that is not known.
        """
        raise UnknownRowsError(path, run.root, "sparsefeat does not know this module")

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        """Which of a joint attention's queries are which stream's, as (start, stop), one such for each batch entry where
        they differ; empty for any other attention.
        """
        return {}

    def reads_text(self, path: str, run: Run, index: int) -> bool:
        """Whether the keys of a module's attention of this index are, or hold, those of the prompt's tokens."""
        return index == 0

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        """Whether an attention module is between an image and the text, and which of its queries and keys are which is
        known: refiners see one stream alone, and sound has no image.
        """
        return "refiner" not in path and self.stream != "audio"

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        """At which of the text's keys the tokens of which text encoder stand; None where the number of the keys tells
        it. `call` are the arguments of the pipeline's call.
        """
        return None

    def width(self, module: nn.Module, io: str) -> int | None:
        """d_model of the module's "output" or "input", None where only running it would tell."""
        return None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        """The grid, (h, w) or (frames, h, w), of the positions the model works on at its finest.

        `arguments` are those of its forward, by name.
        """
        return None

    def check_whole(self, pipe: Any, call: Mapping[str, Any], run: Run) -> None:
        """Raise where the model runs on a part of the image that the call's arguments ask for."""

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        """The grid of the positions of an image tensor of this shape: a feature map [B, C, *grid] carries it. None
        where positions have no grid.
        """
        return tuple(shape[2:]) if len(shape) > 3 else None

    def extent(self, path: str, stream: str, run: Run, shape: Sequence[int]) -> Extent:
        """How the rows of the stream's tensor are shared out among the batch entries; frames that a video model folds
        into the batch are positions of their video.
        """
        positions = math.prod(shape[2:] if len(shape) > 3 else shape[1:-1])
        return Extent(shape[0], positions, self.grid(run, shape) if stream == "image" else None)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        """The grid at the pipeline's default size, where the configs tell it without a run."""
        return None
