"""What is drawn, or looked at, while activations are collected: prompts from a file or a data set, images from a folder.

| source | a prompt is |
|---|---|
| `.txt` | a line |
| `.csv`, `.tsv` | the column's entry; the first line names the columns |
| `.jsonl` | a line that is a JSON text, or an object that has the column as a key |
| `.parquet` | the column's entry (needs pyarrow) |
| a folder or a hub id | the column's entry in a data set of the library `datasets` |

Lines and entries that are empty are left out. Nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

COLUMNS = ("prompt", "caption", "text", "prompts", "captions")
"""Where the prompts are looked for, in this order, if no column is named."""

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Inputs:
    """prompts: one for each image that is drawn. images: the files that are noised and looked at, in the prompts' order;
    empty if images are drawn from noise."""

    prompts: tuple[str, ...]
    images: tuple[Path, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"prompts={self.prompts!r:.80} must be a list of texts.")
        if not self.prompts:
            raise ValueError("prompts is empty: give at least one.")
        object.__setattr__(self, "prompts", tuple(self.prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Of the prompts and of the images' names and bytes: the same for the same inputs in the same order."""
        seen = hashlib.sha256("\0".join(self.prompts).encode())
        for image in self.images:
            seen.update(image.name.encode() + b"\0" + image.read_bytes())
        return seen.hexdigest()[:16]


def read_prompts(
    source: str | Path, column: str | None = None, split: str | None = None, limit: int | None = None
) -> Inputs:
    """The prompts of a file, or of a data set; see the module for what is read.

    column: which one; default the first of `COLUMNS` that there is. split: of a data set; default "train". limit: no
    more than the first so many.

    Raises: FileNotFoundError, ValueError with the source's name and what to do.
    """
    name, path = str(source), Path(source).expanduser()
    kind = path.suffix.lower()
    if split is not None and path.is_file():
        raise ValueError(f"split={split!r} is of a data set and {name} is a file: leave it out.")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ValueError(f"{name} is a pipe or a device: write one prompt a line into a .txt file.")
    if path.is_file():
        if kind not in _READERS:
            raise ValueError(f"{name} is none of {', '.join(_READERS)}: write one prompt a line into a .txt file.")
        found = _READERS[kind](path, column)
    elif kind in _READERS or not name or not (path.is_dir() or _HUB_ID.fullmatch(name)):
        raise FileNotFoundError(f"{name!r} does not exist: name a file of prompts, or a data set of the hub.")
    else:
        found = _of_dataset(name, path, column, split)
    with _in_utf8(name):
        prompts = tuple(islice((text for text in map(str.strip, found) if text), limit))
    if not prompts:
        raise ValueError(f"{name} has no prompt in it: write at least one.")
    return Inputs(prompts)


def read_images(folder: str | Path, limit: int | None = None) -> Inputs:
    """The images of a folder, by name, with their captions: the `text` of each in `metadata.jsonl` or `metadata.csv`
    (`file_name`, `text`, as the data sets of `datasets` have it), or a `.txt` file beside it, or none."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder: name one with images in it.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)[:limit]
    if not files:
        raise ValueError(f"{folder} has no image in it: put some there, as {', '.join(IMAGES)}.")
    captions = dict(_captions(folder))
    beside = {f.name: f.with_suffix(".txt") for f in files}
    for file in files:
        if file.name not in captions and beside[file.name].is_file():
            with _in_utf8(beside[file.name]):
                captions[file.name] = beside[file.name].read_text(encoding="utf-8-sig").strip()
    return Inputs(tuple(captions.get(file.name, "") for file in files), tuple(files))


def _captions(folder: Path) -> Iterator[tuple[str, str]]:
    for path, rows in ((folder / "metadata.jsonl", _json_lines), (folder / "metadata.csv", _csv_rows)):
        if path.is_file():
            with _in_utf8(path):
                for row in rows(path):
                    caption = next((row[name] for name in ("text", *COLUMNS) if name in row), None)
                    if "file_name" in row and caption is not None:
                        yield str(row["file_name"]), str(caption)


@contextlib.contextmanager
def _in_utf8(name: str | Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not text in UTF-8 ({error.reason} at byte {error.start}): save it as that."
        ) from None


def _lines(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise ValueError(f"column={column!r} cannot be of {path}, which has lines of text: leave it out.")
    with open(path, encoding="utf-8-sig") as file:
        yield from file


def _csv_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            yield from reader
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num} of {path} is not CSV ({error}): mend it.") from None


def _json_lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"line {number} of {path} is not JSON ({error.msg}): write one value a line."
                ) from None


def _in_csv(path: Path, column: str | None) -> Iterator[str]:
    rows = _csv_rows(path)
    first = next(rows, None)
    if first is None:
        return
    name = _column(column, [key for key in first if key is not None], path)
    for row in (first, *rows):
        yield row[name] or ""


def _in_json_lines(path: Path, column: str | None) -> Iterator[str]:
    name = None
    for number, entry in enumerate(_json_lines(path), 1):
        if isinstance(entry, dict):
            name = name or _column(column, list(entry), path)
            entry = entry.get(name)
        if not isinstance(entry, str):
            raise ValueError(f"entry {number} of {path} has no text for a prompt: give every line one.")
        yield entry


def _in_parquet(path: Path, column: str | None) -> Iterator[str]:
    parquet = _library("pyarrow.parquet", "pyarrow", path)
    try:
        file = parquet.ParquetFile(path)
    except Exception as error:  # pyarrow's own, by what is wrong with the file
        raise ValueError(f"{path} is not Parquet ({error}): write it again.") from None
    name = _column(column, file.schema_arrow.names, path)
    for batch in file.iter_batches(columns=[name]):
        yield from _texts(batch.column(0).to_pylist(), name, path)


def _of_dataset(name: str, folder: Path, column: str | None, split: str | None) -> Iterator[str]:
    datasets = _library("datasets", "datasets", name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "dataset_info.json").is_file():
            found = datasets.load_from_disk(str(folder))
            found = found[split or "train"] if hasattr(found, "keys") else found
        else:
            found = datasets.load_dataset(name, split=split or "train", streaming=True)
    except KeyError:
        raise ValueError(f"split={split or 'train'!r} is not in {name}, which has {', '.join(found)}.") from None
    except (ValueError, FileNotFoundError, ConnectionError, OSError) as error:
        why = str(error).partition("\n")[0]
        raise ValueError(
            f"the data set {name!r} cannot be opened ({why}): check its name and the connection."
        ) from None
    columns = found.column_names
    key = _column(column, columns if columns is not None else list(next(iter(found))), name)
    return _texts((entry[key] for entry in found), key, name)


def _texts(entries: Iterable[Any], column: str, source: Any) -> Iterator[str]:
    for entry in entries:
        if entry is not None and not isinstance(entry, str):
            raise ValueError(f"column={column!r} of {source} holds {type(entry).__name__}, not text: name another.")
        yield entry or ""


def _column(column: str | None, there: Sequence[str], source: Any) -> str:
    found = next((name for name in (COLUMNS if column is None else (column,)) if name in there), None)
    if found is None:
        wanted = "none of " + ", ".join(COLUMNS) if column is None else f"no {column!r}"
        named = "column=" if column is None else f"column={column!r}"
        raise ValueError(f"{named} must be one of {source}, which has {wanted} but {', '.join(there)}.")
    return found


def _library(module: str, package: str, source: Any) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"{source} is read with {package}, which is not installed: pip install {package}.") from None


_READERS = {
    ".txt": _lines,
    ".csv": _in_csv,
    ".tsv": _in_csv,
    ".jsonl": _in_json_lines,
    ".parquet": _in_parquet,
}
