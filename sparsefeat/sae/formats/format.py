"""What a checkpoint format is, and the safe reading of safetensors that formats share."""

from __future__ import annotations

import json
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
class Format:
    """files: exact names, also what is fetched from a hub; detect: is it in this folder; read: open it."""

    name: str
    files: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path], tuple[SAEConfig, dict[str, Tensor]]]


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
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
                raise KeyError(f"{path} lacks {missing} (it has {sorted(present)}): it was not written for this config")
            for name, shape in shapes.items():
                entry = file.get_slice(name)
                if tuple(entry.get_shape()) != tuple(shape):
                    raise ValueError(
                        f"{name} in {path} has shape {list(entry.get_shape())}, the config says {list(shape)}: "
                        "the two files do not belong together"
                    )
                if entry.get_dtype() not in FLOATING:
                    raise TypeError(
                        f"{name} in {path} has dtype {entry.get_dtype()}: store it as one of {', '.join(FLOATING)}"
                    )
            return {name: file.get_tensor(name) for name in shapes}
    except SafetensorError as error:
        reason = "is cut short" if "incomplete" in str(error).lower() else "is not a safetensors file"
        raise ValueError(f"{path} {reason} ({error}): copy or download it again") from None
