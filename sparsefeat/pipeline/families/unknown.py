"""Components that no family claims: denoisers, which run in the steps and under guidance, and everything else (image
encoders, safety checkers, vocoders). Which of their rows are whose is not known, so a hookpoint has to state its rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import TIMES, Family, Run, UnknownRowsError
from sparsefeat.pipeline.families.transformer import width_of

_DENOISERS = r"diffusers\.models\.(transformers|unets|controlnets)\."


class Unknown(Family):
    """A component of which only its rows, stated by a hookpoint, are taken."""

    makes_embeddings = True

    def claims(self, root: nn.Module) -> bool:
        return True

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        """The lists of modules of one class that the model runs through, whatever they are called."""
        for path, module in root.named_modules():
            parent, _, index = path.rpartition(".")
            if index.isdigit() and "." not in parent and re.search("(?i)block|layer", type(module).__name__):
                yield path, "block", module

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        return ("unknown",)

    def stream_at(self, path: str, module: nn.Module, wanted: str) -> str | None:
        if self.stated_rows is None:
            raise UnknownRowsError(path, module, "sparsefeat does not know the model this lies in")
        return wanted

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        if isinstance(output, (tuple, list)) and sum(isinstance(each, torch.Tensor) for each in output) > 1:
            raise TypeError(
                f"{path} of {type(run.root).__name__} gave {len(output)} outputs, and which one is meant cannot be told: "
                "hook a module inside the block that gives one tensor, such as its attention or feed-forward"
            )
        return 0

    def input_argument(self, path: str, stream: str, given: Callable[[str | None], Any]) -> tuple[str | None, bool]:
        return ("hidden_states" if isinstance(given("hidden_states"), torch.Tensor) else None), False

    def attention_streams(self, path: str, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        raise UnknownRowsError(path, run.root, "sparsefeat does not know the model this lies in")

    def width(self, module: nn.Module, io: str) -> int | None:
        return width_of(module, io)


class UnknownDenoiser(Unknown):
    runs_in_steps = True
    makes_embeddings = False

    def claims(self, root: nn.Module) -> bool:
        if any(re.match(_DENOISERS, cls.__module__) for cls in type(root).__mro__ if cls.__name__ != "ModelMixin"):
            return True
        try:
            names = list(inspect.signature(type(root).forward).parameters)
        except (TypeError, ValueError):
            return False
        return any(name in TIMES for name in names[1:])
