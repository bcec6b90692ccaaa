"""A fitted thing on disk: a folder with one JSON file that names its tensors' file. Always whole, old or new.

The tensors are written first, under a name of their own; the JSON that names them is renamed into place last. A run
that is killed in between leaves the old pair.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsefeat.whole import as_path, whole_folder, written_plainly


def write_folder(folder: str | os.PathLike[str], name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `<name>.json` and its tensors into `folder`, in place of what stood there under this name."""
    folder = as_path(folder)
    if not folder.exists():
        with whole_folder(folder) as unfinished_folder:
            return write_folder(unfinished_folder, name, config, tensors)
    tensor_file = f"{name}-{uuid.uuid4().hex[:12]}.safetensors"
    unfinished = folder / f".{tensor_file}.tmp"
    try:
        with written_plainly(folder):
            save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, unfinished)
            named = {"tensors": tensor_file, "sha256": _digest(unfinished)}
            os.replace(unfinished, folder / tensor_file)
            unfinished = folder / f".{name}.json.tmp"
            unfinished.write_text(json.dumps({**config, **named}, indent=1, allow_nan=False) + "\n")
            os.replace(unfinished, folder / f"{name}.json")
    finally:
        unfinished.unlink(missing_ok=True)
    for old in folder.glob(f"{name}-*.safetensors"):
        if old.name != tensor_file:
            old.unlink()


def read_folder(folder: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The pair `write_folder` wrote.

    Raises:
        FileNotFoundError: there is no `<name>.json`.
        ValueError: it is not a JSON object of this kind, is damaged, or names a file outside the folder.
    """
    path = as_path(folder) / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"folder={str(folder)!r} holds no {name}.json; give the folder that save() wrote.")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:  # also of text that is not UTF-8
        raise ValueError(f"{path} is damaged ({error}); save it again, or give another folder.") from None
    if not isinstance(config, dict) or not isinstance(config.get("tensors"), str):
        raise ValueError(f"{path} is not a {name} saved by sparsefeat; give the folder that save() wrote.")
    tensor_file = config.pop("tensors")
    if Path(tensor_file).name != tensor_file:
        raise ValueError(f"{path} names tensors outside its folder ({tensor_file!r}); it is refused.")
    tensors_at, digest = path.parent / tensor_file, config.pop("sha256", None)  # older files have none
    try:
        same = digest in (None, _digest(tensors_at))
        tensors = load_file(tensors_at)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{tensors_at} is missing or damaged ({error}); save it again.") from None
    if not same:
        raise ValueError(f"{tensors_at} is damaged (its contents are others than were saved); save it again.")
    return config, tensors


def _digest(file: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while part := opened.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
