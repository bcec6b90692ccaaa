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
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparsefeat.arguments import truth
from sparsefeat.features.folders import read_folder, write_folder
from sparsefeat.pipeline import FrozenInstrument, Hookpoint
from sparsefeat.pipeline.step_window import StepWindow
from sparsefeat.sae import SAE, load_sae
from sparsefeat.whole import as_path, whole_folder


class SavableInstrument(FrozenInstrument):
    """An instrument, of one SAE or of none, that can be written to a folder and read back by `load_instrument`.

    A subclass names in `kept` those of its constructor's arguments that are attributes of the same name, tensors or what
    JSON holds; where that does not say it, it has `to_saved` and `from_saved` of its own. Its `window` of steps, and its own
    `condition` and `at`, are written and put back besides.
    """

    kept: ClassVar[tuple[str, ...]] = ()

    def save(self, folder: str | os.PathLike[str], include_sae: bool = True, *, overwrite: bool = False) -> None:
        """Write it, and by default its SAE where it has one, for `load_instrument(folder)`: whole or not at all.

        Raises:
            FileExistsError: something is in `folder`; an earlier instrument is replaced with `overwrite`.
            TypeError: `folder` is no path. ValueError: it is empty; the instrument cannot be saved, and says why.
            OSError: it cannot be written; then nothing was.
        """
        truth("include_sae", include_sae)
        truth("overwrite", overwrite)
        config, tensors = _whole(self)
        kind = next(kind for kind, cls in _KINDS.items() if cls is type(self))
        folder = as_path(folder)
        if (folder / "instrument.json").is_file() and not overwrite:
            raise FileExistsError(
                f"folder={str(folder)!r} holds an instrument already; save to another folder, or replace it by overwrite=True."
            )
        sae = getattr(self, "sae", None)
        description = {
            "kind": kind,
            "format": FORMAT,
            "sae": None if sae is None else fingerprint(sae),
            "settings": config,
        }
        with whole_folder(folder, replace="instrument.json" if overwrite else None) as unfinished:
            if include_sae and sae is not None:
                sae.save(unfinished / "sae")
            write_folder(unfinished, "instrument", description, tensors)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Settings, which are JSON, and tensors."""
        kept = {name: getattr(self, name) for name in self.kept}
        tensors = {name: value.detach() for name, value in kept.items() if isinstance(value, Tensor)}
        return {name: value for name, value in kept.items() if name not in tensors}, tensors

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> SavableInstrument:
        """The instrument from its SAE (None where it has none) and what `to_saved` gave; `at` is a hookpoint, and the window
        of steps is put in afterwards.
        """
        return cls(*(() if sae is None else (sae,)), **config, **tensors)


def _whole(made: SavableInstrument) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """All that is written of an instrument."""
    config, tensors = made.to_saved()
    own = vars(made)
    if isinstance(own.get("window"), StepWindow):
        config["steps"] = own["window"].to_json()
    if isinstance(own.get("condition"), str):
        config["condition"] = own["condition"]
    if isinstance(own.get("at"), Hookpoint):
        config["at"] = [str(own["at"]), own["at"].stream]
    return config, tensors


FORMAT = 1
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


def load_instrument(folder: str | os.PathLike[str], sae: SAE | None = None) -> SavableInstrument:
    """The instrument that was saved in `folder`.

    Args:
        folder: what `save` wrote.
        sae: the SAE it was made with; default the copy saved in the folder. Left out for an instrument without one.

    Raises:
        FileNotFoundError: no instrument there, or it was saved without its SAE and none is given.
        TypeError: `folder` is no path, or `sae` no SAE.
        ValueError: damaged files, a kind that is not known, or another SAE than it was made with.
    """
    folder = as_path(folder)
    description, tensors = read_folder(folder, "instrument")
    if description.get("format") != FORMAT:
        raise ValueError(
            f"{folder} holds an instrument of format {description.get('format')!r:.40}, and this sparsefeat reads {FORMAT}: a "
            "newer one may know it."
        )
    kind = str(description.get("kind"))
    if kind not in _KINDS and re.fullmatch(r"sparsefeat\.\w+:\w+", kind):
        with contextlib.suppress(ImportError):
            importlib.import_module(kind.partition(":")[0])
    if kind not in _KINDS:
        raise ValueError(f"{folder} holds an instrument of kind {kind!r}; known are {', '.join(sorted(_KINDS))}.")
    made_with = description.get("sae")
    if sae is not None and not isinstance(sae, SAE):
        raise TypeError(f"sae is {type(sae).__name__}, not an SAE; open it first, sparsefeat.load_sae(folder).")
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
        settings = dict(description["settings"])
        told = set(settings)
        window = StepWindow.from_json(settings.pop("steps", None))
        if isinstance(settings.get("at"), list) and all(isinstance(part, str) for part in settings["at"]):
            settings["at"] = Hookpoint.parse(*settings["at"])
        if "saes_of_parts" in settings:  # several instruments, each in a folder of its own
            settings = {"parts": _parts(folder, settings["saes_of_parts"])}
        made = _KINDS[kind].from_saved(sae, settings, tensors)
        if "window" in vars(made):
            vars(made)["window"] = window
        lost = set(_whole(made)[0]) - told
        if lost:
            raise KeyError(min(lost))
        return made
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{folder} holds a damaged instrument ({type(error).__name__}: {error}); save it again, or give another folder."
        ) from error


def _parts(folder: Path, saes_of_parts: list[int | None]) -> list[SavableInstrument]:
    """The instruments in `part-0`, `part-1`, ...; those of one SAE, `sae-0`, share it."""
    saes = {i: load_sae(folder / f"sae-{i}") for i in sorted({i for i in saes_of_parts if i is not None})}
    return [load_instrument(folder / f"part-{n}", None if i is None else saes[i]) for n, i in enumerate(saes_of_parts)]


def fingerprint(sae: SAE) -> str:
    """Shape and a hash of the decoder, in bf16 so that the SAE's own precision does not matter."""
    rounded = sae.W_dec.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
    return f"{sae.n_latents}x{sae.d_model}-{hashlib.sha256(rounded.tobytes()).hexdigest()[:16]}"
