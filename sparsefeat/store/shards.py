"""A store: rows of a few named fields, in safetensors shards, with a JSON manifest that says what a row is.

    manifest.json                   {"format": "sparsefeat.store", "format_version": 1, "fields": …, "metadata": …}
    w0000-000003-65536.safetensors  worker 0's shard 3, of 65,536 rows: one tensor [rows, *shape] a field

A shard is written under a temporary name, synced and renamed, so a name without `.partial` is a whole shard and the
list of names is the list of rows: nothing else has to be kept in step, and a killed run loses at most the shard in
hand. Every writer has its worker id and touches only the shards that carry it; to merge stores of one schema, list
several folders in `ShardReader`, or copy the shards into one (worker ids must differ). A shard carries the digest of its
manifest: one that was copied in from a store of other data is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsefeat.disk import InUseError, Lock, sync

NAME, VERSION, MANIFEST = "sparsefeat.store", 1, "manifest.json"
SHARD_NAME = re.compile(r"w(\d{4,})-(\d{6,})-(\d+)\.safetensors")
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


@dataclass(frozen=True)
class Field:
    """One row's entry: its dtype and shape, `()` for a number."""

    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if str(self.dtype).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"dtype is {self.dtype}: a store holds {', '.join(DTYPES)}")
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))


@dataclass(frozen=True)
class Shard:
    """A whole shard on disk. Ordered by worker, then index, within a folder."""

    path: Path
    worker: int
    index: int
    n_rows: int


class ShardWriter:
    """Appends rows to a store, made if it is not there.

    fields: what a row holds; metadata: what all rows share (JSON). Both must be those of an existing store.
    worker: this writer's id; two writers at once need two ids. shard_rows: a shard is closed when it has that many.

    A shard ends only between two `append`s, so that what one append holds is written whole or not at all. `mark` is
    the last mark whose append is on disk: after a kill, go on from there.

    >>> with ShardWriter("acts", {"rows": Field(torch.float16, (320,)), "image": Field(torch.int64)}) as writer:
    ...     for i in range((writer.mark or 0), len(prompts)):
    ...         writer.append({"rows": rows, "image": image_ids}, mark=i + 1)
    """

    def __init__(
        self,
        folder: str | Path,
        fields: Mapping[str, Field],
        *,
        metadata: Mapping[str, Any] | None = None,
        worker: int = 0,
        shard_rows: int = 65_536,
    ) -> None:
        if not fields:
            raise ValueError("fields is empty: name at least one, such as {'rows': Field(torch.float16, (d_model,))}")
        if worker < 0 or shard_rows < 1:
            raise ValueError(
                f"worker is {worker} and shard_rows {shard_rows}: pass a worker id from 0, at least one row"
            )
        self.folder: Path = Path(folder)
        self.fields: dict[str, Field] = dict(fields)
        self.worker: int = worker
        self.shard_rows: int = shard_rows
        self._buffer: list[dict[str, Tensor]] = []
        self._buffered = 0
        manifest = _manifest(self.fields, metadata or {})
        self._digest = _digest(manifest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_manifest(self.folder, manifest)
            self._lock = Lock(self.folder / f".w{worker:04d}.lock")
        except BlockingIOError:
            raise InUseError(
                f"another writer has worker {worker} of {self.folder} open: wait until it ends, or choose another folder or "
                "worker id"
            ) from None
        except OSError as error:
            raise type(error)(f"cannot write into {self.folder} ({error.strerror}): choose another folder") from None
        for leftover in self.folder.glob(f"w{worker:04d}-*.partial"):
            leftover.unlink()
        own = [shard for shard in list_shards(self.folder) if shard.worker == worker]
        self._next = own[-1].index + 1 if own else 0
        self.n_rows: int = sum(shard.n_rows for shard in own)
        self.mark: Any = _read_mark(own[-1], self._digest) if own else None
        self._pending_mark = self.mark

    def append(self, rows: Mapping[str, Tensor], mark: Any = None) -> None:
        """Add rows: for every field a tensor `[n, *shape]` of its dtype. `mark`: any JSON value, see the class."""
        if set(rows) != set(self.fields):
            raise ValueError(f"append got fields {sorted(rows)}: this store has {sorted(self.fields)}")
        n = {name: tensor.shape[0] if tensor.ndim else -1 for name, tensor in rows.items()}
        if len(set(n.values())) != 1:
            raise ValueError(f"append got different numbers of rows, {n}: give every field the same")
        for name, field in self.fields.items():
            tensor = rows[name]
            if tensor.dtype != field.dtype or tuple(tensor.shape[1:]) != field.shape:
                raise ValueError(
                    f"field {name!r} got {tensor.dtype} {list(tensor.shape)}: it holds {field.dtype} "
                    f"[n, {', '.join(map(str, field.shape))}]"
                )
        json.dumps(mark)  # refused now, not when the shard is full
        # A copy: what is on disk must be what was appended, even if the caller reuses the tensor.
        self._buffer.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in rows.items()})
        self._buffered += next(iter(n.values()))
        if mark is not None:
            self._pending_mark = mark
        if self._buffered >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered as a shard, however few rows."""
        if not self._lock.held:
            raise ValueError(f"the writer of {self.folder} is closed: open a new one, it goes on where this one was")
        if not self._buffered:
            return
        tensors = {name: torch.cat([part[name] for part in self._buffer]) for name in self.fields}
        target = self.folder / f"w{self.worker:04d}-{self._next:06d}-{self._buffered}.safetensors"
        partial = target.with_suffix(".partial")
        try:
            # One entry: safetensors writes several in any order, and equal shards are to be equal files.
            written = {"mark": self._pending_mark, "manifest": self._digest}
            save_file(tensors, partial, metadata={"written": json.dumps(written)})
            sync(partial)
            os.rename(partial, target)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            kept = "nothing was kept yet" if self.mark is None else f"rows up to mark {self.mark!r} are safe"
            raise OSError(f"cannot write {target} ({error}): free some space; {kept}") from error
        self.n_rows += self._buffered
        self.mark = self._pending_mark
        self._next += 1
        self._buffer, self._buffered = [], 0

    def close(self) -> None:
        if self._lock.held:
            try:
                self.flush()
            finally:
                self._lock.release()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ShardReader:
    """Reads one store, or several of one schema as if they were one. Holds no rows; what a method holds, it says."""

    def __init__(self, *folders: str | Path) -> None:
        if not folders:
            raise ValueError("ShardReader needs at least one folder")
        self.folders: tuple[Path, ...] = tuple(Path(folder) for folder in folders)
        self.schema: dict[str, Field]
        self.metadata: dict[str, Any]
        self.schema, self.metadata = read_manifest(self.folders[0])
        self._digests: dict[Path, str] = {}
        for folder in self.folders:
            schema, metadata = read_manifest(folder)
            self._digests[folder] = _digest(_manifest(schema, metadata))
            if schema != self.schema:
                raise ValueError(f"{folder} has other fields than {self.folders[0]}: read them apart")
        self.shards: tuple[Shard, ...] = tuple(shard for folder in self.folders for shard in list_shards(folder))
        self._starts = [0]
        for shard in self.shards:
            self._starts.append(self._starts[-1] + shard.n_rows)

    @property
    def folder(self) -> Path:
        return self.folders[0]

    @property
    def n_rows(self) -> int:
        return self._starts[-1]

    def __len__(self) -> int:
        return self.n_rows

    def read_shard(
        self, number: int, fields: Sequence[str] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, Tensor]:
        """The fields of the shard at `shards[number]`, its rows from `start` to `stop`. Reads and holds no others."""
        with self._opened(number, fields) as (file, names):
            return {name: file.get_slice(name)[start:stop] for name in names}

    def check(self) -> ShardReader:
        """Look at the head of every shard, and raise for one that is damaged or of another store; returns itself."""
        for number in range(len(self.shards)):
            with self._opened(number, None):
                pass
        return self

    @contextmanager
    def _opened(self, number: int, fields: Sequence[str] | None) -> Iterator[tuple[Any, list[str]]]:
        shard, names = self.shards[number], self._names(fields)
        try:
            with safe_open(shard.path, framework="pt") as file:
                _mark(shard.path, file, self._digests[shard.path.parent])
                for name in names:
                    found = tuple(file.get_slice(name).get_shape())
                    if found != (shard.n_rows, *self.schema[name].shape):
                        raise ValueError(
                            f"{name} in {shard.path} has shape {list(found)}, not what its name and the manifest say: "
                            "remove the shard or copy it again"
                        )
                yield file, names
        except (SafetensorError, OSError) as error:
            raise _unreadable(shard.path, error, "copy it again, or remove it to go without") from error

    def rows(self, index: Tensor | Sequence[int], fields: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Rows by number, in the order asked. Holds the result and one shard at a time."""
        wanted = torch.as_tensor(index, dtype=torch.int64).flatten()
        if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.n_rows:
            raise IndexError(f"rows {int(wanted.min())} to {int(wanted.max())} were asked for: there are {self.n_rows}")
        names = self._names(fields)
        out = {
            name: torch.empty((len(wanted), *self.schema[name].shape), dtype=self.schema[name].dtype) for name in names
        }
        which = torch.searchsorted(torch.tensor(self._starts[1:]), wanted, right=True)
        for number in which.unique().tolist():
            place = (which == number).nonzero().squeeze(-1)
            shard = self.read_shard(number, names)
            for name in names:
                out[name][place] = shard[name][wanted[place] - self._starts[number]]
        return out

    def batches(
        self,
        batch_size: int,
        *,
        fields: Sequence[str] | None = None,
        seed: int | None = None,
        epoch: int = 0,
        skip: int = 0,
        drop_last: bool = False,
        window: int = 8,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[dict[str, Tensor]]:
        """Batches of rows, once through the store, without the first `skip` of them.

        seed None keeps the order. Otherwise the shards are put in an order, and the rows of `window` consecutive ones
        among each other in another, that seed and epoch decide. Holds one window of shards and a batch; skipped
        windows are not read. part: (i, n) gives of each batch the rows that lie in the i-th of n parts of their shards, and
        reads no others: n readers have each batch between them, some more rows of it, some fewer.
        """
        if not 0 <= part[0] < part[1]:
            raise ValueError(f"part is {part}: pass (i, n) with i from 0 to n - 1")
        if batch_size < 1 or window < 1 or skip < 0:
            raise ValueError(f"batch_size {batch_size}, window {window}, skip {skip}: pass at least 1, 1 and 0")
        names = self._names(fields)
        order, window = list(range(len(self.shards))), window if seed is not None else 1
        # Torch's CPU generator keeps 64 bits of seed; the multiplier keeps (seed, epoch) pairs apart.
        generator = torch.Generator().manual_seed(((seed or 0) * 1_000_003 + epoch) % 2**63)
        if seed is not None:
            order = torch.randperm(len(order), generator=generator).tolist()
        behind = skip * batch_size  # rows still to pass by
        left = {name: torch.empty((0, *self.schema[name].shape), dtype=self.schema[name].dtype) for name in names}
        filled = 0  # rows of the batch in hand, those of other parts too
        for first in range(0, len(order), window):
            group = order[first : first + window]
            n_rows = sum(self.shards[number].n_rows for number in group)
            chosen = torch.arange(n_rows) if seed is None else torch.randperm(n_rows, generator=generator)
            if behind >= n_rows:
                behind -= n_rows
                continue
            pool, place = self._pool(group, names, part)
            chosen, behind = place[chosen[behind:]], 0
            start = 0
            while True:
                picked = chosen[start : start + batch_size - filled]
                own = picked[picked >= 0]
                left = {name: torch.cat([left[name], pool[name][own]]) for name in names}
                start, filled = start + len(picked), filled + len(picked)
                if filled < batch_size:
                    break
                yield left
                left, filled = {name: tensor[:0] for name, tensor in left.items()}, 0
        if filled and not drop_last:
            yield left

    def _pool(self, group: list[int], names: list[str], part: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
        """The part's rows of some shards, and where each of the shards' rows is among them, -1 where it is not."""
        parts, place, held = [], [], 0
        for number in group:
            n = self.shards[number].n_rows
            start, stop = (n * i // part[1] for i in (part[0], part[0] + 1))
            where = torch.full((n,), -1)
            where[start:stop] = torch.arange(held, held + stop - start)
            parts.append(self.read_shard(number, names, start, stop))
            place.append(where)
            held += stop - start
        return {name: torch.cat([one[name] for one in parts]) for name in names}, torch.cat(place)

    def _names(self, fields: Sequence[str] | None) -> list[str]:
        names = list(self.schema) if fields is None else list(fields)
        unknown = [name for name in names if name not in self.schema]
        if unknown or not names:
            raise ValueError(f"fields {unknown} are not in {self.folder}: choose among {list(self.schema)}")
        return names


def list_shards(folder: Path) -> list[Shard]:
    """The whole shards of a folder, by worker and index."""
    found = []
    for path in folder.iterdir():
        match = SHARD_NAME.fullmatch(path.name)
        if match:
            found.append(Shard(path, *(int(part) for part in match.groups())))
    return sorted(found, key=lambda shard: (shard.worker, shard.index))


def read_manifest(folder: Path) -> tuple[dict[str, Field], dict[str, Any]]:
    """The fields and metadata of the store in `folder`."""
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a store, it has no {MANIFEST}: pass the folder a ShardWriter wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != NAME or not isinstance(values["format_version"], int) or values["format_version"] < 1:
            raise ValueError(f"format {values['format']!r} version {values['format_version']!r}")
        newer = values["format_version"] if values["format_version"] > VERSION else None
    except PermissionError:
        raise _forbidden(path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of {NAME} version {VERSION} ({error}): pass another folder") from None
    if newer is not None:
        raise ValueError(
            f"{path} is of version {newer} of {NAME}, of which this sparsefeat reads version {VERSION}: upgrade it"
        )
    try:
        fields = {name: Field(getattr(torch, dtype), tuple(shape)) for name, (dtype, shape) in values["fields"].items()}
        return fields, values["metadata"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no manifest of {NAME} version {VERSION} ({error}): pass another folder") from None


def _manifest(fields: Mapping[str, Field], metadata: Mapping[str, Any]) -> dict[str, Any]:
    described = {name: [str(field.dtype).removeprefix("torch."), list(field.shape)] for name, field in fields.items()}
    content = {"format": NAME, "format_version": VERSION, "fields": described, "metadata": dict(metadata)}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata cannot be JSON ({error}): keep strings, numbers, lists and dicts") from None
    return plain


def _write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Put the manifest there, or compare with the one that is; of several writers at once, one wins."""
    path = folder / MANIFEST
    if not path.exists():
        if any(SHARD_NAME.fullmatch(other.name) for other in folder.iterdir()):
            raise ValueError(f"{folder} has shards but no {MANIFEST}: restore it, or choose a new folder")
        partial = folder / f".{MANIFEST}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sync(partial)
        try:
            os.link(partial, path)  # unlike a rename, fails if another writer was first
        except FileExistsError:
            pass
        finally:
            partial.unlink()
    present = _manifest(*read_manifest(folder))
    for part in ("fields", "metadata"):
        _check_same(folder, part, present[part], content[part])


def check_metadata(folder: str | Path, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError if there is a store in `folder` that has other metadata: a writer with these would be refused."""
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        _check_same(folder, "metadata", read_manifest(folder)[1], _manifest({}, metadata)["metadata"])


def _check_same(folder: Path, part: str, present: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    names = [name for name in {**present, **wanted} if present.get(name) != wanted.get(name)]
    if names:
        differ = "; ".join(f"{name} {present.get(name)!r}, not {wanted.get(name)!r}" for name in names)
        raise ValueError(f"{folder} is a store with other {part} ({differ}): choose a new folder")


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _mark(path: Path, file: Any, digest: str) -> Any:
    """The mark in an open shard, which must have been written under the manifest of this digest."""
    written = json.loads((file.metadata() or {}).get("written", "{}"))
    if written.get("manifest") != digest:
        raise ValueError(f"{path} belongs to another store, whose manifest it was written under: remove it from here")
    return written["mark"]


def last_marks(folder: str | Path) -> dict[int, Any]:
    """The mark of each worker's last shard, by worker; {} where there is no store yet."""
    folder = Path(folder)
    if not folder.is_dir():
        return {}
    shards = list_shards(folder)  # before the manifest, which is there before any shard
    if not shards:
        return {}
    digest = _digest(_manifest(*read_manifest(folder)))
    return {worker: _read_mark(last, digest) for worker, last in {shard.worker: shard for shard in shards}.items()}


def _read_mark(shard: Shard, digest: str) -> Any:
    try:
        with safe_open(shard.path, framework="pt") as file:
            return _mark(shard.path, file, digest)
    except (SafetensorError, OSError) as error:
        raise _unreadable(shard.path, error, "remove it, the run goes on before it") from None


def _forbidden(path: Path) -> PermissionError:
    return PermissionError(f"{path} may not be read (Permission denied): make it readable, chmod u+r")


def _unreadable(path: Path, error: Exception, remedy: str) -> OSError:
    """What to say of a shard; one that may not be read is called "No such file" by safetensors."""
    if path.exists() and not os.access(path, os.R_OK):
        return _forbidden(path)
    return OSError(f"{path} cannot be read ({error}): {remedy}")
