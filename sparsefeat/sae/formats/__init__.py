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


def detect(folder: Path) -> Format:
    """The format whose files lie in `folder`."""
    for candidate in FORMATS:
        if candidate.detect(folder):
            return candidate
    found = sorted(path.name for path in folder.iterdir())[:8]
    expected = "; ".join(f"{f.name}: {' and '.join(f.files)}" for f in FORMATS)
    raise FileNotFoundError(f"{folder} holds no SAE that can be read (found {found or 'nothing'}): expected {expected}")
