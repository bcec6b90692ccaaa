"""Checkpoints: folders that are there whole or not at all, by `torch.distributed.checkpoint`.

    checkpoint-000400/
        state.json     what they are of: step, configs
        .metadata      torch's own: which tensor lies where
        __0_0.distcp   tensors, one file a rank

Any number of ranks may read what any number wrote. The newest whole folder counts; older ones are taken away once a newer
one is there.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from sparsefeat.disk import sync
from sparsefeat.training.ranks import Ranks
from sparsefeat.whole import written_plainly

NAME, VERSION, STATE = "sparsefeat.checkpoint", 1, "state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(
    folder: Path, step: int, described: Mapping[str, Any], tensors: Mapping[str, Tensor], ranks: Ranks
) -> None:
    """Write the tensors, which are the same on all ranks, and what describes them (JSON); all ranks call it."""
    unfinished, final = folder / f".checkpoint-{step:06d}.unfinished", folder / f"checkpoint-{step:06d}"
    try:
        with written_plainly(folder):
            if ranks.first:
                folder.mkdir(parents=True, exist_ok=True)
                for left in folder.glob(".checkpoint-*.unfinished"):
                    shutil.rmtree(left)
                unfinished.mkdir()
                content = {"format": NAME, "format_version": VERSION, "step": step, **described}
                (unfinished / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            ranks.wait()
            writer = FileSystemWriter(unfinished)  # which syncs its files
            with _quietly():
                dcp.save(dict(tensors), storage_writer=writer, no_dist=ranks.world == 1)
            if ranks.first:
                shutil.rmtree(final, ignore_errors=True)
                os.rename(unfinished, final)
                sync(folder)
                for earlier in _whole(folder)[:-1]:
                    shutil.rmtree(earlier)
            ranks.wait()
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        why = getattr(error, "why", None) or getattr(error, "strerror", None) or str(error).splitlines()[-1]
        raise OSError(
            f"cannot write a checkpoint into {folder} ({why}): make room, or choose another folder; the one before is unharmed"
        ) from error


def newest_checkpoint(folder: Path | None) -> Path | None:
    """The last whole one in `folder`, None if there is none."""
    found = [] if folder is None or not folder.is_dir() else _whole(folder)
    return found[-1] if found else None


def read_description(checkpoint: Path) -> dict[str, Any]:
    """What `described` was, with `step`."""
    try:
        values: dict[str, Any] = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if values["format"] != NAME or not isinstance(values["format_version"], int):
            raise ValueError(f"format {values['format']!r}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint} is not a checkpoint of this trainer ({error}): remove it to start anew"
        ) from error
    if values["format_version"] > VERSION:
        raise ValueError(
            f"{checkpoint} is of version {values['format_version']}, this sparsefeat reads {VERSION}: upgrade it"
        )
    return values


def read_tensors(checkpoint: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read into the tensors, in place; all ranks call it."""
    try:
        with _quietly():
            _Reader(checkpoint).read_metadata()  # alone it says better what is wrong with it
            dcp.load(dict(tensors), storage_reader=_Reader(checkpoint), no_dist=ranks.world == 1)
    except Exception as error:  # RuntimeError, KeyError, UnpicklingError, EOFError, ...
        why = str(error).splitlines()[-1] if str(error) else type(error).__name__
        raise ValueError(
            f"{checkpoint} is damaged, or not a checkpoint of this run ({why}): remove it to start anew"
        ) from error


class _Reader(FileSystemReader):
    """Torch's, but that what says where tensors lie, a pickle, can name nothing but torch's own classes for it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as file:
            metadata = _Metadata(io.BytesIO(file.read())).load()
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Metadata(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for what does not only hold data. What is kept as a pickle of its own is none of it:
        this trainer keeps nothing but tensors."""
        described = module == "torch.distributed.checkpoint.metadata" and not name.startswith("Bytes")
        stored = module == "torch.distributed.checkpoint.filesystem" and name.startswith("_Storage")
        kind = module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype))
        if described or stored or kind or (module, name) in _PLAIN:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


_PLAIN = {("pathlib", "PosixPath"), ("torch.serialization", "_get_layout")}


@contextmanager
def _quietly() -> Iterator[None]:
    """Torch warns of a program that is alone, which is no news, and wraps what is raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield
        except dcp.api.CheckpointException as error:  # what the ranks raised, as no Exception
            raise next(iter(error.failures.values()))[0] from None


def _whole(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)),
        key=lambda path: int(path.name.split("-")[1]),
    )
