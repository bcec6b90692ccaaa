"""numpy's `.npz`: a zip archive of arrays, of which arrays of numbers that are not compressed can be read."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from numpy.lib import format as npy

from sparsefeat.sae.files.archive import Archive, mapped_file
from sparsefeat.sae.files.stored import Stored, Unreadable, region
from sparsefeat.sae.files.untrusted import damaged

DTYPES = {"<f8": torch.float64, "<f4": torch.float32, "<f2": torch.float16, "<i8": torch.int64, "<i4": torch.int32}
LONGEST_HEADER = 4096  # bytes before an array's numbers; numpy writes 128


def read_npz(path: Path) -> dict[str, Stored | Unreadable]:
    mapped = mapped_file(path)
    with damaged(path):
        archive = Archive(path, mapped)
        found: dict[str, Stored | Unreadable] = {}
        for record in archive.entries:
            start, length = archive.place(record)
            head = io.BytesIO(mapped[start : start + min(length, LONGEST_HEADER)])
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[npy.read_magic(head)]
            shape, by_columns, kind = read(head)
            name, dtype = record.removesuffix(".npy"), DTYPES.get(kind.str)
            if dtype is None:
                found[name] = Unreadable(f"an array of {kind.str}")
                continue
            n = 1
            for size in shape:
                n *= size
            numbers = region(path, mapped, start + head.tell(), n, dtype, length - head.tell())
            found[name] = numbers.view(0, shape, _strides(shape, by_columns))
        return found


def _strides(shape: tuple[int, ...], by_columns: bool) -> list[int]:
    strides, step = [0] * len(shape), 1
    for axis in range(len(shape)) if by_columns else reversed(range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    return strides
