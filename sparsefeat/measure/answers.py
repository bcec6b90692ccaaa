"""How near an answer must be to the fp64 reference, and which rows of it are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

CHECKED_ROWS = 32

# What an answer may differ from the fp64 reference by. Pre-activations: as a share of the row's largest (fp32: some
# hundred times the rounding of a sum of 4096; half: one rounding of the output and of x - b_pre each). Outputs: relative.
PREACTIVATION: dict[str, float] = {"float64": 2**-40, "float32": 2**-16, "bfloat16": 2**-6, "float16": 2**-9}
OUTPUT = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 2e-2, "float16": 4e-3}
HALF = ("bfloat16", "float16")


def torch_dtype(name: str) -> torch.dtype:
    return getattr(torch, name)


def itemsize(name: str) -> int:
    return torch_dtype(name).itemsize


def checked_rows(rows: int) -> Tensor:
    """Rows that are compared: evenly spread, the first and the last among them, so that every chunk is seen."""
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS)).round().long().unique()


def relative(answer: Tensor, reference: Tensor) -> float:
    difference = (answer.double() - reference.double()).norm()
    return float(difference / reference.double().norm().clamp_min(1e-300))


def output_fault(answer: Tensor, reference: Tensor, dtype: str) -> str:
    off = relative(answer, reference) / OUTPUT[dtype]
    return "" if off <= 1 else f"the answer is {off:.1f} tolerances off"
