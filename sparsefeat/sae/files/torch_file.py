"""Files of `torch.save`: a zip archive with a pickle and one record a storage, or, before torch 1.6, all of it in a row."""

from __future__ import annotations

import io
import mmap
import struct
from pathlib import Path
from typing import Any

import torch

from sparsefeat.sae.files.archive import Archive, mapped_file
from sparsefeat.sae.files.program import REMEDY, run
from sparsefeat.sae.files.stored import Region, Unreadable, region
from sparsefeat.sae.files.untrusted import damaged, shown

LARGEST_PROGRAM = 16 * 2**20  # bytes of the pickle beside the storages; a state dict takes about 100 a tensor
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # what files of before torch 1.6 begin with


def read_torch(path: Path) -> Any:
    """What the file describes: `Stored` tensors, numbers, strings and containers of these, and nothing else."""
    mapped = mapped_file(path)
    with damaged(path):
        return _zipped(path, mapped) if mapped[:2] == b"PK" else _in_a_row(path, mapped)


def _zipped(path: Path, mapped: mmap.mmap) -> Any:
    archive = Archive(path, mapped)
    programs = [name for name in archive.entries if name.endswith("/data.pkl")]
    if len(programs) != 1:
        raise ValueError(f"{path} is a zip archive without one data.pkl: it was not written by torch.save")
    root = programs[0].removesuffix("data.pkl")
    order = root + "byteorder"
    if order in archive.entries and archive.read(order, 16) != b"little":
        raise ValueError(f"{path} was written on a big-endian machine: convert it to safetensors there")

    def storage(said: Any) -> Region | Unreadable:
        dtype, key, n = _storage(said)
        if isinstance(dtype, Unreadable):
            return dtype
        start, held = archive.place(f"{root}data/{key}")
        return region(path, mapped, start, n, dtype, held)

    return run(path, io.BytesIO(archive.read(programs[0], LARGEST_PROGRAM)), storage)


def _storage(said: Any) -> tuple[Any, str, Any]:
    """dtype, key and number of elements of a persistent id."""
    if isinstance(said, tuple) and len(said) >= 5 and said[0] == "storage":
        _, dtype, key, _, n = said[:5]
        if isinstance(dtype, (torch.dtype, Unreadable)) and isinstance(key, str):
            return dtype, key, n
    raise ValueError(f"a storage described by {shown(said)}")


def _in_a_row(path: Path, mapped: mmap.mmap) -> Any:
    """Three pickles of facts, the state, the storages' keys in their order, then each with its length before it.

    The numbers stand after the tensors made of them, so the state is read twice: first to learn of the storages.
    """
    program = io.BytesIO(mapped[:LARGEST_PROGRAM])
    seen: dict[str, tuple[Any, Any]] = {}

    def note(said: Any) -> Unreadable:
        dtype, key, n = _storage(said)
        if len(said) > 5 and said[5] is not None:
            raise ValueError(f"{path} shares storages in a way only torch before 1.0 wrote: {REMEDY}")
        seen[key] = (dtype, n)
        return Unreadable("a storage")

    if mapped[:1] != b"\x80":
        raise ValueError("no file of torch.save begins so")
    if run(path, program, note) != OLD_MAGIC:
        raise ValueError(f"{path} is a pickle, but none that torch.save wrote: {REMEDY}")
    run(path, program, note)  # the protocol
    facts = run(path, program, note)
    if not isinstance(facts, dict) or facts.get("little_endian") is not True:
        raise ValueError(f"{path} was written on a big-endian machine: convert it to safetensors there")
    at_state = program.tell()
    run(path, program, note)
    keys = run(path, program, note)
    at, regions = program.tell(), dict[str, Region | Unreadable]()
    for key in keys if isinstance(keys, list) else ():
        dtype, n = seen[key]
        if isinstance(dtype, Unreadable):
            raise ValueError(f"{path} holds {dtype.what}: {REMEDY}")
        (there,) = struct.unpack("<q", mapped[at : at + 8])
        held = min(len(mapped) - at - 8, there * dtype.itemsize)
        regions[key] = region(path, mapped, at + 8, n, dtype, held)
        at += 8 + n * dtype.itemsize
    program.seek(at_state)
    return run(path, program, lambda said: regions[_storage(said)[1]])
