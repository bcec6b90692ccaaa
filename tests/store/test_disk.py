"""Locks, here and as they are on Windows: its `msvcrt.locking` is played by one that keeps bytes per file."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from sparsefeat import disk
from sparsefeat.store import Field, ShardReader, ShardWriter


class Msvcrt:
    """Windows' locks of one byte: mandatory, of the open file, gone when it is closed."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.holders: dict[tuple[int, int], int] = {}

    def locking(self, descriptor: int, mode: int, n_bytes: int) -> None:
        assert (mode, n_bytes) == (self.LK_NBLCK, 1)
        status = os.fstat(descriptor)
        holder = self.holders.get((status.st_dev, status.st_ino))
        if holder is not None and holder != descriptor and is_open(holder, status):
            raise PermissionError(errno.EACCES, "Permission denied")
        self.holders[status.st_dev, status.st_ino] = descriptor


def is_open(descriptor: int, status: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), status)
    except OSError:
        return False


@pytest.fixture(params=["posix", "windows"])
def system(request, monkeypatch):
    if request.param == "windows":
        monkeypatch.setattr(disk, "fcntl", None)
        monkeypatch.setattr(disk, "msvcrt", Msvcrt(), raising=False)
    return request.param


def test_a_lock_is_held_by_one_until_it_is_released(system, tmp_path):
    path = tmp_path / ".w0000.lock"
    first = disk.Lock(path)
    with pytest.raises(BlockingIOError):
        disk.Lock(path)
    assert first.held
    first.release()
    first.release()
    assert not path.exists()
    second = disk.Lock(path)
    assert second.held
    assert not first.held
    second.release()


def test_two_writers_of_one_worker_are_refused_and_one_goes_on_after_the_other(system, tmp_path):
    fields = {"rows": Field(torch.float32, (3,))}
    with ShardWriter(tmp_path / "store", fields) as writer:
        writer.append({"rows": torch.ones(5, 3)})
        with pytest.raises(RuntimeError, match="another writer has worker 0"):
            ShardWriter(tmp_path / "store", fields)
    with ShardWriter(tmp_path / "store", fields) as writer:
        writer.append({"rows": torch.ones(2, 3)})
    assert ShardReader(tmp_path / "store").n_rows == 7
    assert not list((tmp_path / "store").glob(".w*"))


def test_a_system_without_fcntl_can_import_the_store(tmp_path):
    program = (
        "import subprocess, sys, types, safetensors.torch, torch.distributed; sys.modules['fcntl'] = None; sys.modules['msvcrt'] = types.ModuleType('msvcrt');"
        "import sparsefeat.store, sparsefeat.disk; print(sparsefeat.disk.fcntl)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.strip().endswith("None"), ran.stderr
