"""The other programs that compute what an op computes, one file each.

An adapter has NAME, the distribution's `PACKAGE` (None: plain PyTorch), `why_absent()`, which imports it and says why it
cannot be used ("": it can), and `providers(op, dtype, device)`. A library is called the way its own documentation calls
it, in its own layout of the weights, and what it lacks it is not given: a peer that is not installed is listed as such.

The dense way of SAELens and of every paper's first code is in `sparsefeat.measure.sae_case` ("dense PyTorch"), so
that an installed wheel can be measured against it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from functools import cache
from types import ModuleType
from typing import Any

from sparsefeat.measure.timing import Provider

ADAPTERS = (
    "linear_topk",
    "compiled",
    "sparsify",
    "sae_lens",
    "dictionary_learning",
    "overcomplete",
    "openai",
    "value_augmentation",
    "daam",
)


@cache
def load() -> tuple[tuple[ModuleType, ...], dict[str, str]]:
    """The adapters that can be used, and the names of the others with the reason."""
    found, absent = [], {}
    for name in ADAPTERS:
        adapter: Any = importlib.import_module(f"bench.peers.{name}")
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reason = adapter.why_absent()
        if reason:
            absent[adapter.NAME] = reason
        else:
            found.append(adapter)
    return tuple(found), absent


def packages() -> tuple[str, ...]:
    """The distributions of the peers that can be used, for their versions."""
    return tuple(adapter.PACKAGE for adapter in load()[0] if adapter.PACKAGE)


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return [provider for adapter in load()[0] for provider in adapter.providers(op, dtype, device)]


def importable(module: str) -> str:
    """Why `module` cannot be imported, in one line; "" if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a library raises when it is imported
        if isinstance(error, ModuleNotFoundError) and error.name == module.split(".")[0]:
            return "not installed"
        return f"cannot be imported: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""
