"""The checkpoint formats `load_sae` reads: one file a format, listed here in the order they are tried.

A format's file ends in a `FORMAT`. Its `read` gives the config and the tensors named in `SAEConfig.tensor_shapes`, in
any floating dtype, and refuses in one sentence what they cannot represent. Foreign files are untrusted: safetensors,
or `torch.load(weights_only=True)`, with keys and shapes checked before anything is allocated.
"""

from __future__ import annotations

from pathlib import Path

from sparsefeat.sae.formats import native
from sparsefeat.sae.formats.format import Format

FORMATS: tuple[Format, ...] = (native.FORMAT,)


def detect(place: Path) -> Format:
    """The format of what lies in this folder, or of this single file."""
    for candidate in FORMATS:
        if candidate.detect(place):
            return candidate
    expected = "; ".join(f"{f.title}: {' and '.join(f.files) or 'a single file'}" for f in FORMATS)
    if place.is_file():
        if any(candidate.detect(place.parent) for candidate in FORMATS):
            raise NotADirectoryError(f"{place} is one of the files of an SAE: pass the folder it lies in")
        raise ValueError(f"{place} is no SAE that can be read: expected one of {expected}")
    found = sorted(path.name for path in place.iterdir())[:8]
    raise FileNotFoundError(f"{place} holds no SAE that can be read (found {found or 'nothing'}): expected {expected}")
