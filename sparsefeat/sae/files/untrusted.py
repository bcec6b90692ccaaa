"""What every file is asked first, and the one sentence in which every failure ends."""

from __future__ import annotations

import contextlib
import os
import reprlib
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 80, 80, 40
HEAD = 512  # bytes in which a page of the web or a pointer of git shows itself


def shown(value: object) -> str:
    """`repr(value)`, short whatever a file made of it: lists that share their parts would print for ever."""
    return _SHORT.repr(value)


def must_be_file(path: Path) -> int:
    """The size of a regular file; a pipe, a device or a folder in its place, and what was downloaded instead, are said."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: an SAE needs it, copy it there too") from None
    except OSError as error:
        raise OSError(f"{path} cannot be opened ({error.strerror}): copy it there again") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind}: a file was expected")
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`, or download it")
    if b"/annex/objects/" in head and found.st_size < HEAD:
        raise ValueError(f"{path} is a git-annex pointer, not the file itself: run `git annex get`, or download it")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ValueError(f"{path} is a web page (HTML), not the file itself: download the file, not the page about it")
    return found.st_size


@contextlib.contextmanager
def reading(place: Path) -> Iterator[None]:
    """Round everything that looks into files: whatever fails ends in a ValueError or OSError that names the path."""
    try:
        yield
    except (ValueError, OSError) as error:
        said = type(error) in (ValueError, FileNotFoundError, NotADirectoryError, OSError) and str(place) in str(error)
        if said:
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{place}: {first_line(error)}") from error
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        raise ValueError(f"{place} is damaged or was not made by this format's program ({reason})") from error


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Round the parsing of one file: what is not a refusal that names it already is called damage."""
    try:
        yield
    except Exception as error:
        if type(error) is ValueError and str(path) in str(error):
            raise
        reason = first_line(error) or type(error).__name__
        raise ValueError(f"{path} is damaged ({reason}): copy or download it again") from error


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300]


def say(place: Path, sentence: str) -> None:
    """What a reader did that its user would want to know, as a warning."""
    warnings.warn(f"{place}: {sentence}", stacklevel=2)
