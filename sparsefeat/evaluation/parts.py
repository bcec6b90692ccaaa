"""Finished parts of a long measurement, each a file: a run that was stopped goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsefeat.whole import write_json


class Parts:
    """Whoever makes it names the folder for everything that the parts depend on, so that none is taken for another's.

    Args:
        folder: of the parts.
        said: hears of every part that is finished.
    """

    def __init__(self, folder: Path, said: Callable[[str], object] = lambda line: None) -> None:
        self.folder: Path = folder
        self.said: Callable[[str], object] = said

    def has(self, key: str) -> bool:
        """Whether `kept` has it on disk."""
        return self._path(key).is_file()

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """What `make()` gives, of JSON's types, made if it is not on disk yet."""
        if not self.has(key):
            write_json(self._path(key), make())
            self.said(key)
        return json.loads(self._path(key).read_text(encoding="utf-8"))  # as a run that goes on reads it

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def folder_for(work: Path, measured: Mapping[str, Any]) -> Path:
    """The folder within `work` of parts that depend on `measured`, of JSON's types: another for anything else."""
    return work / hashlib.sha256(json.dumps(measured, sort_keys=True).encode()).hexdigest()[:12]
