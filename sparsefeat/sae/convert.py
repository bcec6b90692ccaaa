"""Write an SAE in another program's format, and say what of it that format does not keep."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import torch

from sparsefeat.sae.formats import FORMATS, native
from sparsefeat.sae.formats.format import Format
from sparsefeat.sae.io import load_sae
from sparsefeat.sae.module import SAE
from sparsefeat.whole import whole_folder

CHECKED_ROWS = 64


@dataclass(frozen=True)
class Converted:
    """folder: what was written; difference: the largest between the reconstructions of 64 standard normal rows by the
    SAE and by what was written, read back; lost: names of what the config said and what was written does not."""

    folder: Path
    difference: float
    lost: tuple[str, ...]


def writable() -> tuple[str, ...]:
    return tuple(f.name for f in FORMATS if f.write is not None or f is native.FORMAT)


def convert(sae: SAE, folder: str | Path, name: str) -> Converted:
    """Write `sae` in the format `name` into `folder`, which is made, there whole or not at all.

    What the format cannot express is refused with a ValueError before anything is written. A folder that holds anything
    is refused with a FileExistsError.
    """
    folder = Path(folder)
    chosen = _format(name)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not an empty folder: choose another")
    state = {name: tensor.detach().cpu() for name, tensor in sae.state_dict().items()}
    if chosen.write is None:
        sae.save(folder)
    else:
        with whole_folder(folder) as unfinished:
            chosen.write(unfinished, sae.config, state)
    return _read_back(sae, folder)


def _format(name: str) -> Format:
    for found in FORMATS:
        if found.name == name and name in writable():
            return found
    known = any(found.name == name for found in FORMATS)
    problem = "is only read, not written" if known else "is not known"
    raise ValueError(f"format {name!r} {problem}: choose one of {', '.join(writable())}")


@torch.no_grad()
def _read_back(sae: SAE, folder: Path) -> Converted:
    again = load_sae(folder, k=sae.config.k, device=sae.device, dtype=sae.dtype)
    rows = torch.randn(CHECKED_ROWS, sae.d_model, generator=torch.Generator().manual_seed(0))
    rows = rows.to(sae.device, sae.dtype)
    difference = float((sae(rows) - again(rows)).abs().max())
    old, new = sae.config, again.config
    lost = [f.name for f in fields(old) if f.name in ("hookpoint", "base_model", "transcoder") and
            getattr(old, f.name) and getattr(new, f.name) != getattr(old, f.name)]  # fmt: skip
    lost += [f"metadata {key!r}" for key in old.metadata if key not in new.metadata]
    lost += [f"statistic {name!r}" for name in old.statistics if name not in new.statistics]
    return Converted(folder, difference, tuple(lost))
