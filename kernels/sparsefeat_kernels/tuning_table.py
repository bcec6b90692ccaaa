"""Which design and block sizes of an op a GPU runs: tables that `python -m sparsefeat_kernels.tuning` measured.

A table is JSON: the device it was measured on, when, with which versions, and its entries, each the fastest configuration
of one op at one shape and dtype. An op asks for the entry nearest its own shape; without one it takes its defaults.

    packaged    tuning/tables/*.json beside this file: the one of the device's name, else one of its capability
    your own    the file that the environment variable SPARSEFEAT_TUNING names, whatever the device; empty: no table
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .dispatch import backend

__all__ = ["DESIGNS", "Entry", "Table", "read_table", "tuned"]

VARIABLE = "SPARSEFEAT_TUNING"
FOLDER = Path(__file__).with_name("tuning") / "tables"
SIZES = ("rows", "d", "n_latents", "k")
# The sum, over the sizes, of doublings to the nearest entry: beyond, an entry says nothing about a shape.
FARTHEST = 4.0

_PRODUCT = ("BLOCK_ROWS", "BLOCK_LATENTS", "BLOCK_D", "num_warps", "num_stages")
# What an entry of an op and design says.
DESIGNS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("topk_encode", "A"): _PRODUCT,
    ("sparse_decode", "A"): ("BLOCK_K", "BLOCK_D", "num_warps"),
}
LARGEST = {"num_warps": 32, "num_stages": 8}  # of everything else 1024


@dataclass(frozen=True)
class Entry:
    """The fastest configuration of an op at a shape."""

    op: str
    rows: int
    d: int
    n_latents: int
    k: int
    dtype: str  # "bfloat16"
    design: str
    blocks: Mapping[str, int]
    median_ms: float

    def __post_init__(self) -> None:
        names = DESIGNS.get((self.op, self.design))
        if names is None:
            known = ", ".join(f"{op} {design}" for op, design in DESIGNS)
            raise ValueError(f"op and design must be one of {known}, got {self.op!r} {self.design!r}; tune again")
        for name in SIZES:
            if not isinstance(size := getattr(self, name), int) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}; tune again")
        if not isinstance(self.dtype, str) or not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype must be the name of one, as bfloat16 is, got {self.dtype!r}; tune again")
        if set(self.blocks) != set(names):
            raise ValueError(f"blocks must be {', '.join(names)}, got {', '.join(self.blocks)}; tune again")
        for name, size in self.blocks.items():
            power = name == "num_stages" or (isinstance(size, int) and size & (size - 1) == 0)
            if not isinstance(size, int) or not power or not 1 <= size <= LARGEST.get(name, 1024):
                raise ValueError(f"{name} is no size of a block, got {size!r}; tune again")
        if not isinstance(self.median_ms, float) or not 0 < self.median_ms < math.inf:
            raise ValueError(f"median_ms must be a positive number, got {self.median_ms!r}; tune again")

    def distance(self, sizes: tuple[int | None, ...]) -> float:
        """Doublings and halvings from this entry's shape to `sizes` (of SIZES), over all that are given."""
        given = [(name, size) for name, size in zip(SIZES, sizes, strict=True) if size is not None]
        return sum(abs(math.log2(size / getattr(self, name))) for name, size in given)


@dataclass(frozen=True)
class Table:
    device: str  # torch.cuda.get_device_name
    capability: tuple[int, int]
    backend: str  # "cuda" or "hip"
    date: str
    versions: Mapping[str, str]
    entries: tuple[Entry, ...]

    def nearest(self, op: str, dtype: torch.dtype, sizes: tuple[int | None, ...]) -> Entry | None:
        """The entry of the nearest shape, the first of equally near ones; None if there is none within FARTHEST."""
        fitting = [e for e in self.entries if e.op == op and e.dtype == str(dtype).removeprefix("torch.")]
        best = min(fitting, key=lambda entry: entry.distance(sizes), default=None)
        return best if best is not None and best.distance(sizes) <= FARTHEST else None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_table(path: Path) -> Table:
    """The table in a file. Raises ValueError naming the file and what is wrong with it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no tuning table ({error}); write it with python -m sparsefeat_kernels.tuning"
        ) from None
    try:
        entries = tuple(Entry(**entry) for entry in found["entries"])
        capability = tuple(int(part) for part in found["capability"])
        if len(capability) != 2:
            raise ValueError(f"capability must be two numbers, got {found['capability']!r}; tune again")
        return Table(
            str(found["device"]), (capability[0], capability[1]), str(found["backend"]), str(found["date"]),
            dict(found["versions"]), entries,
        )  # fmt: skip
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no tuning table: {type(error).__name__}: {error}; tune again") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def packaged_table(device: str, capability: tuple[int, int], of: str, folder: Path = FOLDER) -> Table | None:
    """Of the tables in `folder`, by name: that of the device, else the first of its capability and backend."""
    tables = [read_table(path) for path in sorted(folder.glob("*.json"))]
    alike = [table for table in tables if table.backend == of and table.capability == capability]
    same = [table for table in alike if table.device == device]
    return next(iter([*same, *alike]), None)


@functools.cache
def _table_of(index: int | None, own: str | None) -> Table | None:
    if own is not None:
        return read_table(Path(own)) if own else None
    if index is None:
        return None
    return packaged_table(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index), backend())


@functools.lru_cache(maxsize=4096)
def _nearest(
    index: int | None, own: str | None, op: str, dtype: torch.dtype, sizes: tuple[int | None, ...]
) -> Entry | None:
    table = _table_of(index, own)
    return None if table is None else table.nearest(op, dtype, sizes)


def tuned(op: str, W: torch.Tensor, rows: int, k: int | None = None) -> Entry | None:
    """The entry for `op` on `rows` rows and a dictionary W [n_latents, d], or None: take the defaults. Without k, of any.

    Raises ValueError if SPARSEFEAT_TUNING names a file that is no table.
    """
    n_latents, d = W.shape
    if 0 in (rows, d, n_latents, k):
        return None
    index = W.get_device() if W.is_cuda else None
    return _nearest(index, os.environ.get(VARIABLE), op, W.dtype, (rows, d, n_latents, k))
