"""Zip archives of numbers: where each record lies in the mapped file. Records that are compressed are not read."""

from __future__ import annotations

import mmap
import struct
import zipfile
from pathlib import Path

from sparsefeat.sae.files.untrusted import must_be_file

LARGEST_DIRECTORY = 2**20  # bytes of a table of contents, of which zipfile makes ten times as many; about 80 a record
END, WIDE_END, LOCAL = b"PK\x05\x06", b"PK\x06\x06", b"PK\x03\x04"


def mapped_file(path: Path) -> mmap.mmap:
    """The file's bytes, read from the disk when they are used; a page that is written to is copied first."""
    if not must_be_file(path):
        raise ValueError(f"{path} is empty: copy or download it again")
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


class Archive:
    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path: Path = path
        self.mapped: mmap.mmap = mapped
        self._check_directory()
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise ValueError(
                f"{path} is a TorchScript module, which runs code: in the program that wrote it, save its weights alone, "
                "torch.save(model.state_dict(), path)"
            )
        if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
            raise ValueError(
                f"{path} has records that are compressed or encrypted: in the program that wrote it, save them as they are, "
                "with torch.save or numpy.savez"
            )
        self.entries: dict[str, zipfile.ZipInfo] = {entry.filename: entry for entry in entries}

    def place(self, name: str) -> tuple[int, int]:
        """First byte and length of a record."""
        entry = self.entries[name]
        header = self.mapped[entry.header_offset : entry.header_offset + 30]
        signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
        start = entry.header_offset + 30 + name_length + extra_length
        if signature != LOCAL or entry.file_size != entry.compress_size:
            raise ValueError(f"record {name!r} is not where the table of contents says")
        if start + entry.file_size > len(self.mapped):
            raise ValueError(f"record {name!r} is cut short")
        return start, entry.file_size

    def read(self, name: str, most: int) -> bytes:
        """A small record whole."""
        start, length = self.place(name)
        if length > most:
            raise ValueError(f"record {name!r} has {length} bytes, more than the {most} that were expected")
        return self.mapped[start : start + length]

    def _check_directory(self) -> None:
        at = self.mapped.rfind(END, max(0, len(self.mapped) - 2**16 - 22))
        if at < 0:
            raise ValueError("a zip archive without its end")
        (length,) = struct.unpack("<I", self.mapped[at + 12 : at + 16])
        wide = self.mapped.rfind(WIDE_END, max(0, at - 2**16), at)  # of archives beyond 4 GB
        if wide >= 0:
            (beyond,) = struct.unpack("<Q", self.mapped[wide + 40 : wide + 48])
            length = beyond if length == 2**32 - 1 else max(length, beyond)
        if length > LARGEST_DIRECTORY:
            raise ValueError(f"a table of contents of {length} bytes")
