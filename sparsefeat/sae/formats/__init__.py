"""The checkpoint formats `load_sae` reads: one file a format, listed here in the order they are tried.

A format's file ends in a `FORMAT`. Its `read` gives the config and the tensors named in `SAEConfig.tensor_shapes`, in
any floating dtype, and refuses in one sentence what they cannot represent. Foreign files are untrusted: see
`sparsefeat.sae.files`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from sparsefeat.sae.files import must_be_file, read_weights
from sparsefeat.sae.formats import (
    bionemo,
    crosscoder,
    dictionary_learning,
    difffract,
    fae,
    itda,
    matryoshka,
    native,
    openai,
    overcomplete,
    sae_lens,
    sparsify,
    unbox,
)
from sparsefeat.sae.formats.format import Format
from sparsefeat.sae.formats.language import gemma_scope, goodfire, llama_scope, mwhanna, qwen_scope

# Endings of formats that are a single file, of any name.
SINGLE_FILES = (".pt", ".pth", ".safetensors")

FORMATS: tuple[Format, ...] = (
    native.FORMAT,
    sparsify.FORMAT,
    sae_lens.FORMAT,
    unbox.FORMAT,
    openai.FORMAT,
    crosscoder.FORMAT,  # before dictionary_learning: its checkpoints have the same names
    dictionary_learning.FORMAT,
    overcomplete.FORMAT,
    itda.FORMAT,
    fae.FORMAT,
    matryoshka.FORMAT,
    difffract.FORMAT,
    bionemo.FORMAT,
    gemma_scope.FORMAT,
    llama_scope.FORMAT,
    goodfire.FORMAT,
    qwen_scope.FORMAT,
    mwhanna.FORMAT,
)


def detect(place: Path) -> Format:
    """The format of what lies in this folder, or of this single file."""
    for candidate in FORMATS:
        if candidate.detect(place):
            return candidate
    if place.is_file() and place.suffix in SINGLE_FILES:
        _look(place)
    expected = "; ".join(f"{f.title}: {' and '.join(f.files) or 'a single file'}" for f in FORMATS)
    if place.is_file():
        if any(candidate.detect(place.parent) for candidate in FORMATS):
            raise NotADirectoryError(f"{place} is one of the files of an SAE: pass the folder it lies in")
        raise ValueError(f"{place} is no SAE that can be read: expected one of {expected}")
    for path in (place / name for known in FORMATS for name in known.files + known.optional):
        if path.exists():
            _look(path)
    inside = _below(place)
    if inside:
        raise FileNotFoundError(
            f"{place} holds {len(inside)} SAEs in folders below it: pass one as subfolder, such as subfolder={inside[0]!r}"
        )
    files = [path for path in sorted(place.iterdir()) if path.is_file() and _is_one(path)]
    if files:
        raise FileNotFoundError(
            f"{place} is the folder of an SAE that is a single file: pass the file, {' or '.join(map(str, files[:8]))}"
        )
    found = sorted(path.name for path in place.iterdir())[:8]
    raise FileNotFoundError(f"{place} holds no SAE that can be read (found {found or 'nothing'}): expected {expected}")


def _look(path: Path) -> None:
    """Raise what is wrong with a file, if it is not at least what its name says."""
    must_be_file(path)
    if path.suffix in SINGLE_FILES:
        read_weights(path)


def _is_one(file: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return any(candidate.detect(file) for candidate in FORMATS)
    return False


def _below(place: Path) -> list[str]:
    """Folders with an SAE one or two levels down, as training runs leave them (`RUN/HOOKPOINT`, `RUN/final`)."""
    found = []
    for path in sorted([*place.glob("*/"), *place.glob("*/*/")]):
        with contextlib.suppress(OSError, ValueError):  # a broken file further down is not what was asked for
            if path.is_dir() and any(candidate.detect(path) for candidate in FORMATS):
                found.append(str(path.relative_to(place)))
    return found
