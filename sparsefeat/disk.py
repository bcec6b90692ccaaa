"""What a file system is asked for: that what was written is on the disk, and that one process alone writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
    import msvcrt


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if fcntl is None and path.is_dir():
        return  # Windows opens no folders: it keeps names in its journal by itself
    descriptor = os.open(path, os.O_RDONLY if fcntl is not None else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class InUseError(RuntimeError):
    """Another run writes, or has written meanwhile, where this one would."""


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """The folder, of which nothing need be there, is written into by one process at a time; another gets InUseError."""
    made = [place for place in folder.parents if not place.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = Lock(folder.parent / f".{folder.name}.lock")  # beside it: after a kill nothing foreign is in it
    except BlockingIOError:
        raise InUseError(
            f"another run is writing into {folder}; wait until it ends, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # something is in it by now
            for place in made:
                place.rmdir()


class Lock:
    """Held from here on until `release`, or the end of the process, however that comes.

    Raises:
        BlockingIOError: another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        while True:
            self._file = open(path, "w")  # noqa: SIM115 (held until it is released)
            try:
                _lock(self._file)
                if path.exists() and os.path.samestat(os.fstat(self._file.fileno()), path.stat()):
                    return  # else its last holder took the file away in between
            except BaseException:
                self._file.close()
                raise
            self._file.close()

    @property
    def held(self) -> bool:
        return not self._file.closed

    def release(self) -> None:
        """Give it up, and take its file away; a second call does nothing."""
        if not self.held:
            return
        if fcntl is not None:
            self.path.unlink(missing_ok=True)  # while it is held, or the next one's would go
            self._file.close()
            return
        self._file.close()  # Windows takes away no file that is open: neither ours before, nor the next one's after
        with suppress(OSError):
            self.path.unlink()


def _lock(file: IO[str]) -> None:
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError as error:  # PermissionError for a byte that another process has
        raise BlockingIOError(*error.args) from None
