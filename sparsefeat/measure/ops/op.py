"""What an op is to whoever measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsefeat.measure.sae_case import SAECase, sae_case
from sparsefeat.measure.timing import Provider

Shape = Mapping[str, int]


def sae_inputs(shape: Shape, dtype: str, device: str, seed: int) -> SAECase:
    return sae_case(**shape, dtype=dtype, device=device, seed=seed)


@dataclass(frozen=True)
class Op:
    """One op: its providers, what is right, what it costs as (FLOPs, bytes) of the shape and the item size, and its
    inputs of a shape, dtype, device and seed."""

    providers: Callable[[], list[Provider]]
    fault: Callable[[Any, Any], str]
    cost: Callable[[Shape, int], tuple[float, float]]
    inputs: Callable[[Shape, str, str, int], Any] = sae_inputs
    gradients: bool = False
