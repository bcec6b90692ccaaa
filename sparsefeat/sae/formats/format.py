"""What a checkpoint format is, and the safe reading of files that formats share.

Files are untrusted. safetensors are checked by their header before anything is read; pickles are opened with
`weights_only=True`, which runs none of the code they may carry, and refused if they need any.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefeat.sae.config import SAEConfig

# safetensors' own names of the floating dtypes an SAE may be stored in.
FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Given:
    """What the caller of `load_sae` says of an SAE whose format does not store it."""

    k: int | None = None


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    name: short, as in `sparsefeat sae convert --format NAME`; title: what people call it.
    files: exact names of what must be there, optional of what may be; both are fetched from a hub. A format that is one
        file of any name has none.
    detect: whether this folder or file is of the format. read: open it. Both take a folder or a single file.
    write: into an empty folder; refuses in one sentence, before it writes anything, what the format cannot express.
        None where nothing is written in the format.
    """

    name: str
    title: str
    files: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path, Given], tuple[SAEConfig, dict[str, Tensor]]]
    write: Callable[[Path, SAEConfig, Mapping[str, Tensor]], None] | None = None
    optional: tuple[str, ...] = ()


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin a file with a mark
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: an SAE folder needs it, copy it there too") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): copy or download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}: a JSON object was expected")
    return values


def read_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors named in `shapes`; names, shapes and dtypes are checked in the header before any is read."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: an SAE folder needs it, copy it there too")
    try:
        with safe_open(path, framework="pt") as file:
            present = set(file.keys())
            missing = sorted(set(shapes) - present)
            if missing:
                raise ValueError(
                    f"{path} lacks {missing} (it has {sorted(present)}): it was not written for this config"
                )
            for name, shape in shapes.items():
                entry = file.get_slice(name)
                if tuple(entry.get_shape()) != tuple(shape):
                    raise ValueError(
                        f"{name} in {path} has shape {list(entry.get_shape())}, the config says {list(shape)}: "
                        "the two files do not belong together"
                    )
                if entry.get_dtype() not in FLOATING:
                    raise ValueError(
                        f"{name} in {path} has dtype {entry.get_dtype()}: store it as one of {', '.join(FLOATING)}"
                    )
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        reason = "is cut short" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise ValueError(f"{path} {reason} ({error}): copy or download it again") from None


def read_torch(path: Path) -> Any:
    """What `torch.save` wrote, if it is tensors, numbers, strings and containers of these, and nothing else."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: an SAE folder needs it, copy it there too")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Unsupported" not in str(error):
            raise _damaged(path, error) from None
        reason = next((line for line in str(error).split("\n") if "Unsupported" in line or "GLOBAL" in line), "objects")
        raise ValueError(
            f"{path} is a pickle that could run code when it is opened ({_global(reason)}): in the program that wrote it, "
            "save its weights alone, torch.save(model.state_dict(), path)"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(path, error) from None


def _global(reason: str) -> str:
    """What the pickle asks for, without torch's advice to trust it."""
    return reason.strip().partition(" was not an allowed global")[0].removeprefix("WeightsUnpickler error: ")


def mentions(path: Path, *names: str) -> bool:
    """Whether the file that `torch.save` wrote names all of these, as keys or modules; nothing of it is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = (e for e in archive.infolist() if e.filename.endswith("/data.pkl") and e.file_size < 2**26)
            program = next((archive.read(entry) for entry in entries), b"")
    except (OSError, zipfile.BadZipFile):
        return False
    return all(name.encode() in program for name in names)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged ({str(error).strip().split(chr(10))[0]}): copy or download it again")


def check_tensors(path: Path, state: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors named in `shapes` out of a state dict that was read from `path`, names, shapes and dtypes checked."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{path} holds a {type(state).__name__}: a state dict was expected")
    missing = sorted(set(shapes) - set(state))
    if missing:
        raise ValueError(
            f"{path} lacks {missing} (it has {sorted(map(str, state))}): it was not written for this config"
        )
    for name, shape in shapes.items():
        tensor = state[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} in {path} is {kind}: a floating tensor was expected")
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(
                f"{name} in {path} has shape {list(tensor.shape)}, {list(shape)} was expected: "
                "the files do not belong together"
            )
    return {name: state[name] for name in shapes}
