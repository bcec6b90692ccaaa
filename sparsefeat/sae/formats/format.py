"""What a checkpoint format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig


@dataclass(frozen=True)
class Given:
    """What the caller of `load_sae` says of an SAE whose format does not store it."""

    k: int | None = None


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    name: short, as in `sparsefeat sae convert --format NAME`; title: what people call it.
    files: exact names of what must be there, optional of what may be; both are fetched from a hub. A format that is one
        file of any name has none.
    detect: whether this folder or file is of the format. read: open it. Both take a folder or a single file.
    write: into an empty folder; refuses in one sentence, before it writes anything, what the format cannot express.
        None where nothing is written in the format.
    """

    name: str
    title: str
    files: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path, Given], tuple[SAEConfig, dict[str, Tensor]]]
    write: Callable[[Path, SAEConfig, Mapping[str, Tensor]], None] | None = None
    optional: tuple[str, ...] = ()
