"""A tensor that a file declares: its shape and dtype, checked against the bytes that are there; read when it is asked for."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stored:
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Unreadable:
    """Something in a file that is no plain tensor, number, string or container; refused when it is asked for."""

    what: str


@dataclass(frozen=True)
class Region:
    """`n` numbers of one dtype in a mapped file, from byte `start` on."""

    path: Path
    mapped: Any
    start: int
    n: int
    dtype: torch.dtype

    def view(self, offset: object, shape: object, stride: object) -> Stored:
        """A tensor over these numbers, which must all lie in the region, each used no more than once."""
        sizes, steps, first = whole_numbers(shape), whole_numbers(stride), whole_numbers([offset])
        if sizes is None or steps is None or first is None or len(sizes) != len(steps):
            raise ValueError(f"{self.path} declares a tensor of shape {shape!s:.80}: it is damaged, download it again")
        numel = math.prod(sizes)
        last = first[0] + sum((size - 1) * step for size, step in zip(sizes, steps, strict=True))
        if numel and (last >= self.n or numel > self.n):
            raise ValueError(
                f"{self.path} declares a tensor of {numel} numbers of which {self.n} are in the file: save copies of "
                "expanded tensors (tensor.clone()), or download it again"
            )

        def load() -> Tensor:
            return self.numbers().as_strided(sizes, steps, first[0]) if numel else torch.empty(sizes, dtype=self.dtype)

        return Stored(tuple(sizes), self.dtype, load)

    def numbers(self) -> Tensor:
        """All of them; they are read from the disk when they are used, unless they do not lie on a multiple of 8."""
        if self.start % 8:
            copied = bytearray(self.mapped[self.start : self.start + self.n * self.dtype.itemsize])
            return torch.frombuffer(copied, dtype=self.dtype)
        return torch.frombuffer(self.mapped, dtype=self.dtype, count=self.n, offset=self.start)


def region(path: Path, mapped: Any, start: int, n: object, dtype: torch.dtype, held: int) -> Region:
    """`n` is what the file declares, `held` the bytes it has for it."""
    if isinstance(n, bool) or not isinstance(n, int) or n < 0 or n * dtype.itemsize > held:
        raise ValueError(f"{path} declares {n!s:.40} numbers where it holds {held} bytes: it is cut short or damaged")
    if sys.byteorder != "little":
        raise ValueError(f"{path} cannot be read on a big-endian machine: convert it to safetensors elsewhere")
    return Region(path, mapped, start, n, dtype)


def whole_numbers(values: object) -> list[int] | None:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return None
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62 for v in values)
    return list(values) if whole else None
