"""Folders and files that are there whole or not at all, and what is said when they cannot be written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Errors that only a write meets with, beside a full disk.
_OF_WRITING = (errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
LONGEST = 255  # bytes of a name, on every usual file system


@contextmanager
def whole_folder(folder: str | os.PathLike[str], name: str = "folder", *, replace: str | None = None) -> Iterator[Path]:
    """A folder to write into, which has the name `folder` once everything in here is done; until then nothing has it.

        with whole_folder("results") as unfinished:
            (unfinished / "a.txt").write_text("a")

    It is made beside `folder` at once, so what cannot be written is told before the work. If the work fails, or is
    interrupted, what was made is taken back and what stood there stands. An empty folder may stand there.

    Args:
        name: how the caller's user calls it, for the sentences.
        replace: a folder that holds a file of this name is one of ours, and is replaced.

    Raises:
        FileExistsError: something stands there that is not to be replaced.
        OSError: it cannot be made or written, with a remedy in the sentence.
    """
    folder = as_path(folder, name)
    check_free(folder, name, replace=replace)
    with _beside(folder, name) as unfinished:
        yield unfinished
        check_free(folder, name, replace=replace)  # again: minutes may have passed
        old = unfinished.with_suffix(".old")
        if replace is not None and folder.exists():
            folder.rename(old)
        try:
            unfinished.rename(folder)  # also onto an empty folder
        except BaseException:
            if old.exists():
                old.rename(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)


def as_path(given: str | os.PathLike[str], name: str = "folder", what: str = "a folder") -> Path:
    """The path; TypeError for what is none, and ValueError for an empty one, which pathlib takes for the folder one is in."""
    if not isinstance(given, (str, os.PathLike)):
        raise TypeError(f"{name} is {type(given).__name__}, not a path; give {what} as text or a pathlib.Path")
    if not os.fspath(given).strip():
        raise ValueError(f"{name} is empty; name {what}")
    for part in Path(given).parts:
        if "\0" in part:
            raise ValueError(f"{name} has {part!r:.40} in it, and no file's name holds a null byte; leave it out")
        if len(part.encode("utf-8", "surrogatepass")) > LONGEST:
            raise ValueError(f"{name} has '{part[:20]}…' in it, too long for a file's name; choose a shorter one")
    return Path(given).expanduser()


def check_free(folder: Path, name: str = "folder", *, replace: str | None = None) -> None:
    """Raise FileExistsError where `whole_folder` would."""
    if not os.path.lexists(folder):
        return
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if replace is not None and (folder / replace).is_file():
        return
    raise FileExistsError(f"{name} {folder} exists already; choose another folder")


def check_writable(place: str | os.PathLike[str], name: str = "folder") -> None:
    """Raise OSError where nothing can be made beside `place`; call it before work that takes minutes."""
    with _beside(Path(place), name):
        pass


def place_to_fill(given: str | os.PathLike[str], name: str = "folder") -> Path:
    """The path of a folder that is written into bit by bit, and may be there; OSError where that cannot be."""
    folder = as_path(given, name)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{name} {folder} is a file; name a folder")
    check_writable(folder / "new" if folder.is_dir() else folder, name)
    return folder


class NotWrittenError(OSError):
    """`place`, which its user calls `name`, could not be written, for the reason `why`."""

    def __init__(self, place: Path, name: str, why: str):
        super().__init__(
            f"{name} {place} could not be written ({why}), and nothing of it was kept; make room, or choose another disk"
        )
        self.place: Path = place.absolute()
        self.why: str = why


class Ended(KeyboardInterrupt):
    """A signal asked for the end, by its number: like Ctrl-C, so that everything on the way is cleaned up.

    `kept`: what was kept of the work.
    """

    def __init__(self, said: str = "", *, number: int = signal.SIGINT, kept: str = "nothing was written"):
        super().__init__(said)
        self.number: int = number
        self.kept: str = kept


@contextmanager
def written_plainly(
    place: str | os.PathLike[str], name: str = "folder", *, unfinished: Path | None = None
) -> Iterator[None]:
    """A full disk, and what else keeps `place` from being written, is told in one sentence, whoever noticed it.

    `unfinished`: where it is written for the time being; what was said of a part in there is said of `place`.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, NotWrittenError):
            of_a_part = unfinished is not None and error.place.is_relative_to(unfinished.absolute())
            why = error.why if of_a_part else None
        else:
            why = _why_unwritten(error)
        if why is None:
            raise
        raise NotWrittenError(Path(place), name, why) from error


def write_text(path: Path, text: str, name: str = "the file") -> None:
    """UTF-8 into a file, whole or as it was, its folder made if need be; OSError in one sentence where that cannot be."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with written_plainly(path, name):
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """`write_text` of JSON, a line an entry."""
    write_text(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def _beside(place: Path, name: str) -> Iterator[Path]:
    """An empty folder beside `place`, whose parents are made; all is taken back unless `place` comes to be."""
    unfinished = place.parent / f".{place.name}.{uuid.uuid4().hex[:8]}.unfinished"
    parents = [parent for parent in unfinished.parents if not parent.exists()]
    standing = next(parent for parent in unfinished.parents if parent.exists())
    if not standing.is_dir():
        raise NotADirectoryError(f"{name} {place} cannot be made, {standing} is a file; choose another place")
    try:
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise OSError(f"{name} {place} cannot be made ({error.strerror}); choose another place") from error
        with written_plainly(place, name, unfinished=unfinished):
            yield unfinished
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        for parent in [] if place.exists() else parents:
            try:
                parent.rmdir()
            except OSError:  # it was never made, or somebody else's is in it by now
                continue


def _why_unwritten(error: Exception) -> str | None:
    """The reason if `error` is of writing; None for another."""
    number = error.errno if isinstance(error, OSError) else None
    told = re.search(r"\(os error (\d+)\)", str(error))
    if number is None and told is not None:  # safetensors, by way of Rust
        number = int(told[1])
    if number is None and "PytorchStreamWriter failed writing" in str(error):  # torch.save; it does not say why
        number = errno.ENOSPC
    if number == errno.ENOSPC:
        return "the disk is full"
    return os.strerror(number) if number in _OF_WRITING else None
