"""castorini/daam. Its maps come out of hooks on a diffusers pipeline, so that it has no call on plain tensors; what
those hooks compute, eager probabilities, is the figure's "dense PyTorch"."""

from __future__ import annotations

from bench.peers import importable
from sparsefeat.measure.timing import Provider

NAME = "daam"
PACKAGE = "daam"


def why_absent() -> str:
    return importable("daam") or "runs inside a diffusers pipeline only: no call on plain tensors"


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return []
