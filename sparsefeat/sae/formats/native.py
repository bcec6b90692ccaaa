"""sparsefeat's own format: a folder with `config.json` and `sae.safetensors`.

`config.json` is `SAEConfig.to_json()` with `"format": "sparsefeat.sae"` and `"format_version": 1`; `sae.safetensors`
holds the tensors of `SAEConfig.tensor_shapes` under the same names.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsefeat.disk import sync
from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import read_json, shown, weights
from sparsefeat.sae.files.weights import FLOATING
from sparsefeat.sae.formats.format import Format, Given
from sparsefeat.whole import written_plainly

NAME = "sparsefeat.sae"
VERSION = 1
CONFIG, WEIGHTS = "config.json", "sae.safetensors"


def detect(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    if not (folder / WEIGHTS).exists():
        return (folder / CONFIG).exists() and read_json(folder / CONFIG).get("format") == NAME
    return not (folder / "cfg.json").exists()  # EleutherAI's files of the same name come with a cfg.json


def read(folder: Path, given: Given | None = None) -> tuple[SAEConfig, dict[str, Tensor]]:
    if not (folder / CONFIG).exists():
        raise FileNotFoundError(
            f"{folder / CONFIG} is missing beside {WEIGHTS} (or cfg.json, if they are EleutherAI sparsify's): copy it there"
        )
    values = read_json(folder / CONFIG)
    name, version = values.pop("format", None), values.pop("format_version", None)
    if name != NAME:
        raise ValueError(f"{folder / CONFIG} has format {shown(name)}: {NAME!r} was expected")
    if version != VERSION:
        raise ValueError(
            f"{folder / CONFIG} has format_version {shown(version)}, this sparsefeat reads {VERSION}: upgrade it"
        )
    try:
        config = SAEConfig.from_json(values)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    with weights(folder / WEIGHTS) as held:
        return config, held.take(config.tensor_shapes())


def holds(folder: Path, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the folder has these weights, as far as its dtype tells."""
    try:
        _, kept = read(folder)
    except (OSError, ValueError):
        return False
    return kept.keys() <= tensors.keys() and all(
        kept[name].shape == tensors[name].shape and torch.equal(kept[name], tensors[name].detach().to(kept[name]))
        for name in kept
    )


def write(
    folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None, overwrite: bool
) -> Path:
    """Write the SAE into `folder`; `dtype` stores it in another floating dtype, float16 for half the bytes.

    A new folder is prepared beside its place and renamed, so that it is there whole or not at all. A folder that holds
    these weights already is written again; anything else in the way, and these in a wider dtype, is refused unless
    `overwrite` (which replaces the two files, one after the other, and leaves others alone).
    """
    if dtype is not None and dtype not in FLOATING.values():
        raise ValueError(f"dtype is {dtype!r}: choose a floating dtype, such as torch.float16")
    state = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in config.tensor_shapes()}
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or Inf as {tensor.dtype}: save a wider dtype, or train again")
    if not overwrite:
        _check_place(folder, config, state)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise type(error)(f"cannot write into {folder.parent} ({error.strerror}): choose another folder") from None
    try:
        staged.chmod(0o777 & ~_umask())
        with written_plainly(folder):
            save_file(state, staged / WEIGHTS)
            described = {"format": NAME, "format_version": VERSION, **config.to_json()}
            (staged / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
            for name in (WEIGHTS, CONFIG):
                sync(staged / name)
        try:
            os.rename(staged, folder)  # also onto an empty folder
        except OSError:
            for name in (WEIGHTS, CONFIG):
                os.replace(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return folder


def _check_place(folder: Path, config: SAEConfig, state: Mapping[str, Tensor]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: choose a folder to save the SAE in")
    if not any(folder.iterdir()):
        return
    if not detect(folder):
        raise FileExistsError(f"{folder} holds other files: choose a new folder, or add to it with overwrite=True")
    present = {"format": NAME, "format_version": VERSION, **config.to_json()}
    if read_json(folder / CONFIG) != present:
        raise FileExistsError(f"{folder} holds an SAE of another config: choose a new folder, or pass overwrite=True")
    if not holds(folder, state):
        raise FileExistsError(
            f"{folder} holds an SAE of the same config with other weights, or these in a wider dtype: choose a new folder, or "
            "pass overwrite=True"
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


FORMAT = Format("sparsefeat", "sparsefeat", (CONFIG, WEIGHTS), detect, read)
