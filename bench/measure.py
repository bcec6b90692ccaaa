"""Figures with all their peers, and the way from a measurement to pytest-benchmark. The measuring itself is
`sparsefeat.measure.timing`, in the package, because an installed wheel measures too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bench import peers
from sparsefeat.measure import figures
from sparsefeat.measure import timing as core
from sparsefeat.measure.timing import OURS, Ceilings, Figure, Results, fresh_peak, measure_ceilings

__all__ = [
    "OURS",
    "Ceilings",
    "Figure",
    "Results",
    "available",
    "build",
    "fresh_peak",
    "into_extra_info",
    "measure",
    "measure_ceilings",
]

measure = core.measure
available = figures.available

# Here and not in `build`: the process that children are forked from, to measure memory, imports this module, and so the
# libraries, once.
core.VERSIONED.extend(peers.packages())


def build(op: str, shape: Mapping[str, int], dtype: str = "float32", device: str = "cpu") -> Figure:
    """The figure of the package, with every peer that can be used here."""
    figure = figures.build(op, shape, dtype, device)
    arguments = {"op": op, "shape": dict(shape), "dtype": dtype, "device": device}
    return replace(
        figure,
        providers=(*figure.providers, *peers.providers(op, dtype, device)),
        absent=peers.load()[1],
        recipe=(__name__, "build", arguments),
    )


def into_extra_info(benchmark: Any, records: list[dict[str, Any]]) -> None:
    """Hand a figure's records to pytest-benchmark's `benchmark` fixture, ours first."""
    ours = next((record for record in records if record["provider"] == OURS), records[0])
    benchmark.extra_info |= {key: ours[key] for key in ours if key not in ("device", "versions", "absent")}
    benchmark.extra_info["providers"] = {
        record["provider"]: {key: record[key] for key in ("checked", "fault", "median_ms", "peak_bytes")}
        for record in records
    }
