"""Reading the JSON config of a foreign format: its numbers checked before they size anything, its path in every error."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsefeat.sae.config import SAEConfig


def whole_number(path: Path, values: Mapping[str, Any], name: str, at_least: int = 1) -> int:
    """`values[name]`, which must be there and be a whole number."""
    if name not in values:
        remedy = "pass the k of training, load_sae(…, k=)" if name == "k" else "it is not the config of these weights"
        raise ValueError(f"{path} lacks {name!r} (it has {sorted(values)}): {remedy}")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} in {path} is {value!r}: a whole number of at least {at_least} was expected")
    return value


def flag(path: Path, values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """`values[name]`, True or False; `default` where it is absent or null."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} in {path} is {value!r}: true or false was expected")
    return value


def config_of(path: Path, **fields: Any) -> SAEConfig:
    """`SAEConfig(**fields)`; what it refuses is said of the file at `path`."""
    try:
        return SAEConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
