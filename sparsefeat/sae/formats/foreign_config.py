"""Reading the JSON config of a foreign format: its numbers checked before they size anything, its path in every error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import shown


def whole_number(path: Path, values: Mapping[str, Any], name: str, at_least: int = 1) -> int:
    """`values[name]`, which must be there and be a whole number."""
    if name not in values:
        remedy = "pass the k of training, load_sae(…, k=)" if name == "k" else "it is not the config of these weights"
        raise ValueError(f"{path} lacks {name!r} (it has {sorted(map(str, values))[:20]}): {remedy}")
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} in {path} is {shown(value)}: a whole number of at least {at_least} was expected")
    return value


def k_of(path: Path, values: Mapping[str, Any], given: int | None) -> int:
    """The caller's k, or else the config's."""
    if given is None:
        return whole_number(path, values, "k")
    values.get("k")  # it is understood, and the caller knows better
    return given


def flag(path: Path, values: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """`values[name]`, True or False; `default` where it is absent or null."""
    value = values.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ValueError(f"{name} in {path} is {shown(value)}: true or false was expected")
    return value


def config_of(path: Path, **fields: Any) -> SAEConfig:
    """`SAEConfig(**fields)`; what it refuses is said of the file at `path`."""
    try:
        return SAEConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def text(path: Path, values: Mapping[str, Any], name: str) -> str | None:
    """`values[name]`, a name; None where it is absent, null or empty."""
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} in {path} is {shown(value)}: a name was expected")
    return value or None


def number(path: Path, values: Mapping[str, Any], name: str, default: float | None) -> float | None:
    """`values[name]`, a finite number; `default` where it is absent, None where it is null."""
    value = values.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} in {path} is {shown(value)}: a number was expected")
    return float(value)
