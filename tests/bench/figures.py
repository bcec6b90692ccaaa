"""A figure of plain functions, for tests of measuring itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsefeat.measure.timing import Ceilings, Figure, Provider

CEILINGS = Ceilings(copy=1e9, product={"float32": 1e9})


def squares(*providers: Provider, **options: Any) -> Figure:
    """What is asked for: the square of the input."""
    options = {"flops": 1e6, "bytes": 4e6, **options}
    return Figure(
        op="square",
        shape={"rows": 3},
        dtype="float32",
        device="cpu",
        inputs=lambda seed: torch.arange(3.0) + seed,
        providers=providers,
        check=lambda x, answer: "" if torch.equal(answer, x * x) else "not the square",
        **options,
    )


def provider(name: str, run: Callable[[Any], Any] = torch.square, **options: Any) -> Provider:
    return Provider(name, run, **options)
