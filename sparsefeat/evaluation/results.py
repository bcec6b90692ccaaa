"""Files of results: where they were measured, and on which weights of the package's own."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from typing import Any

from sparsefeat.assets import embedded_fingerprint
from sparsefeat.measure.machine import device_name, versions

STALE = "**Stale**: of another pipeline, SAE or judge than is shipped; measure it again."


def measured_here() -> dict[str, Any]:
    """What stands first in a file of results: `device`, `date`, `versions`."""
    return {"device": device_name(), "date": date.today().isoformat(), "versions": versions()}


def measured_on_embedded(joint: bool = False) -> dict[str, Any]:
    """What stands first in a file of results of the embedded pipeline, or of both: `measured_here()`, and the weights'
    `fingerprint`."""
    return {**measured_here(), "fingerprint": embedded_fingerprint(joint)}


def stale(results: Mapping[str, Any]) -> bool:
    """Whether results of the embedded pipeline are of other weights than the package has now, or do not say of which."""
    return results.get("fingerprint") not in (embedded_fingerprint(), embedded_fingerprint(joint=True))
