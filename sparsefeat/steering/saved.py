"""Instruments on disk: `instrument.save(folder)` and `load_instrument(folder)`.

A folder holds `instrument.json` (kind, settings, and the fingerprint of the SAE, null where there is none), its tensors,
and unless left out the SAE itself in `sae/`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparsefeat.features.folders import read_folder, write_folder
from sparsefeat.pipeline import Instrument
from sparsefeat.sae import SAE, load_sae
from sparsefeat.whole import as_path, whole_folder


class SavableInstrument(Instrument):
    """An instrument, of one SAE or of none, that can be written to a folder and read back by `load_instrument`."""

    def save(self, folder: str | os.PathLike[str], include_sae: bool = True, *, overwrite: bool = False) -> None:
        """Write the settings, by `save_instrument`, and by default the SAE.

        Raises:
            FileExistsError: something is in `folder`; an earlier instrument is replaced with `overwrite`.
            OSError: it cannot be written; then nothing was.
        """
        raise NotImplementedError

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> SavableInstrument:
        """The instrument from its SAE (None where it has none) and the settings and tensors that `save` wrote."""
        raise NotImplementedError


_KINDS: dict[str, type[SavableInstrument]] = {}
_Class = TypeVar("_Class", bound=type[SavableInstrument])


def register(kind: str) -> Callable[[_Class], _Class]:
    """Class decorator: instruments of this kind are restored by the class's `from_saved(sae, config, tensors)`.

    `kind` is "package:name", where the class is to be found; packages of sparsefeat are imported when they are needed.
    """

    def add(cls: _Class) -> _Class:
        _KINDS[kind] = cls
        return cls

    return add


def save_instrument(
    instrument: SavableInstrument,
    folder: str | os.PathLike[str],
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    include_sae: bool,
    overwrite: bool,
) -> None:
    """Write an instrument of a registered kind, whole or not at all; called by its `save`."""
    kind = next(kind for kind, cls in _KINDS.items() if cls is type(instrument))
    folder = as_path(folder)
    if (folder / "instrument.json").is_file() and not overwrite:
        raise FileExistsError(
            f"folder={str(folder)!r} holds an instrument already; save to another folder, or replace it by overwrite=True."
        )
    sae = getattr(instrument, "sae", None)
    description = {"kind": kind, "format": 1, "sae": None if sae is None else fingerprint(sae), "settings": config}
    with whole_folder(folder, replace="instrument.json" if overwrite else None) as unfinished:
        if include_sae and sae is not None:
            sae.save(unfinished / "sae")
        write_folder(unfinished, "instrument", description, tensors)


def load_instrument(folder: str | os.PathLike[str], sae: SAE | None = None) -> SavableInstrument:
    """The instrument that was saved in `folder`.

    Args:
        folder: what `save` wrote.
        sae: the SAE it was made with; default the copy saved in the folder. Left out for an instrument without one.

    Raises:
        FileNotFoundError: no instrument there, or it was saved without its SAE and none is given.
        ValueError: a kind that is not known, or another SAE than it was made with.
    """
    folder = as_path(folder)
    description, tensors = read_folder(folder, "instrument")
    kind = str(description.get("kind"))
    if kind not in _KINDS and re.fullmatch(r"sparsefeat\.\w+:\w+", kind):
        with contextlib.suppress(ImportError):
            importlib.import_module(kind.partition(":")[0])
    if kind not in _KINDS:
        raise ValueError(f"{folder} holds an instrument of kind {kind!r}; known are {', '.join(sorted(_KINDS))}.")
    made_with = description.get("sae")
    if made_with is None and sae is not None:
        raise ValueError(f"{folder} holds an instrument that has no SAE; leave sae= out.")
    if made_with is not None and sae is None:
        if not (Path(folder) / "sae").is_dir():
            raise FileNotFoundError(f"{folder} was saved without its SAE; pass it: load_instrument(folder, sae=sae).")
        sae = load_sae(Path(folder) / "sae")
    if sae is not None and fingerprint(sae) != made_with:
        raise ValueError(
            f"sae= is not the SAE that {folder} was made with ({made_with}, given: {fingerprint(sae)}); "
            "latents would mean other things. Pass the same SAE."
        )
    try:
        return _KINDS[kind].from_saved(sae, description["settings"], tensors)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder} holds a damaged instrument ({type(error).__name__}: {error}); save it again, or give another folder."
        ) from error


def fingerprint(sae: SAE) -> str:
    """Shape and a hash of the decoder, in bf16 so that the SAE's own precision does not matter."""
    rounded = sae.W_dec.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return f"{sae.n_latents}x{sae.d_model}-{hashlib.sha256(rounded.tobytes()).hexdigest()[:16]}"
