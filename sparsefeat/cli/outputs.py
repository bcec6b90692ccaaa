"""Folders and files that commands write: refused before the work where they cannot be, there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer


def print_json(document: Any) -> None:
    typer.echo(json.dumps(document, indent=1, ensure_ascii=False))


@contextmanager
def new_folder(path: Path, option: str = "--out") -> Iterator[Path]:
    """A folder to write into, which is called `path` once everything in here is done; until then nothing is.

    It is made beside `path` at once, so that what cannot be written is told before the work. What was made is taken back
    if the work fails.

    Raises:
        FileExistsError: `path` exists: nothing of the user's is written over.
        OSError: it cannot be made.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{option} {path} exists already; choose another folder")
    unfinished = path.parent / f".{path.name}.{os.getpid()}.unfinished"
    made = [folder for folder in unfinished.parents if not folder.exists()]
    try:
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"{option} {path} cannot be made ({error.strerror}); choose another folder") from None
        yield unfinished
        if os.path.lexists(path):
            raise FileExistsError(f"{option} {path} was made by somebody else meanwhile; choose another folder")
        unfinished.rename(path)
        made = []
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in made:
            try:
                folder.rmdir()
            except OSError:  # somebody else's is in it now, or it was never made
                break
