"""Write an SAE in another program's format, and say what of it that format does not keep."""

from __future__ import annotations

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsefeat.sae.formats import FORMATS, native
from sparsefeat.sae.formats.format import Format
from sparsefeat.sae.module import SAE, load_sae
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
    try:
        return _read_back(sae, folder)
    except BaseException:
        shutil.rmtree(folder)
        raise


def _format(name: str) -> Format:
    for found in FORMATS:
        if found.name == name and name in writable():
            return found
    known = any(found.name == name for found in FORMATS)
    problem = "is only read, not written" if known else "is not known"
    raise ValueError(f"format {name!r} {problem}: choose one of {', '.join(writable())}")


@torch.no_grad()
def _read_back(sae: SAE, folder: Path) -> Converted:
    """Both in float32 at least: a difference in half precision would be the rounding of the rows, not of the weights."""
    wide = torch.promote_types(sae.dtype, torch.float32)
    again = load_sae(folder, device=sae.device, dtype=wide)
    ours = sae if sae.dtype == wide else copy.deepcopy(sae).to(wide)
    training = ours.training
    rows = torch.randn(CHECKED_ROWS, sae.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(
        sae.device, wide
    )
    difference = float((ours.eval()(rows) - again(rows)).abs().max())
    ours.train(training)
    old, new = sae.config, again.config
    lost = [
        name
        for name in ("hookpoint", "base_model", "transcoder", "k")
        if getattr(old, name) and getattr(new, name) != getattr(old, name)
    ]
    lost += [f"metadata {key!r}" for key in old.metadata if key not in new.metadata]
    lost += [f"statistic {name!r}" for name in old.statistics if name not in new.statistics]
    return Converted(folder, difference, tuple(lost))
