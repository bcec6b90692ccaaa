"""Tables of measured speed: what `bench.run`, `sparsefeat bench` and the docs say of the records in a results file.

Knows nothing of torch, so that a table can be written where nothing can be measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = Mapping[str, Any]
OURS = "sparsefeat"
OPS = (
    "topk_encode", "sparse_decode", "forward", "training_step", "sparse_edit", "feature_stats", "weight_gradient",
    "threshold_encode", "matching_pursuit", "attention_map", "attention_tap", "attention_rows",
    "attention_column_sums", "concept_attention", "concept_map", "attention_map_gradient", "resize_add",
)  # fmt: skip
COMMITTED = Path(__file__).resolve().parents[1] / "assets" / "results"  # what the package carries
HEADER = [
    "op", "shape", "sparsefeat", "fastest other", "times faster", "time / the bare part", "memory", "other's memory",
    "of the ceiling",
]  # fmt: skip
A_TABLES_ROWS_AN_OP = 3  # of docs/benchmarks.md; the file beside the results has them all


@dataclass(frozen=True)
class Row:
    """One figure: our fastest record, and the fastest right one of all others that are not bounds (None: there is none).

    times_faster: the median over rounds of the other's time over ours. bounds: our time over that of each bound.
    """

    ours: Record
    other: Record | None
    times_faster: float | None
    bounds: Mapping[str, float]


def figures(records: Iterable[Record]) -> list[list[Record]]:
    """The records, those of one figure together, in the order they came in."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps([record["op"], record["shape"], record["dtype"]]), []).append(record)
    return list(groups.values())


def summary(records: Iterable[Record]) -> list[Row]:
    """A row a figure; figures without a right answer of ours have none."""
    rows = []
    for group in figures(records):
        timed = [record for record in group if record["checked"] and record["median_ms"] is not None]
        own = [record for record in timed if record["provider"].split(",")[0] == OURS]
        if not own:
            continue
        ours = min(own, key=lambda record: record["median_ms"])
        others = [record for record in timed if record not in own and not record["bound"]]
        other = min(others, key=lambda record: record["median_ms"]) if others else None
        bounds = {r["provider"]: 1 / ours["ratio"][r["provider"]] for r in timed if r["bound"]}
        rows.append(Row(ours, other, ours["ratio"][other["provider"]] if other else None, bounds))
    return rows


def shape_text(shape: Mapping[str, int]) -> str:
    """`1,024 rows, 1280 → 20,480, k = 32`, or the sizes of an attention, or of its maps."""
    if "d_model" in shape:
        return f"{shape['rows']:,} rows, {shape['d_model']} → {shape['n_latents']:,}, k = {shape['k']}"
    if "side" in shape:
        return f"{shape['maps']} maps × {shape['t']} tokens, {shape['side']}² to {shape['to']}²"
    text = f"{shape['batch']} × {shape['heads']} heads × {shape['d']}, {shape['n']:,} positions, {shape['t']} tokens"
    return text + (f", {shape['selected']} mapped" if "selected" in shape else "")


def milliseconds(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f} ms" if value < 1 else f"{value:.1f} ms" if value < 100 else f"{value:,.0f} ms"


def size(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"


def factor(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def cells(row: Row) -> list[str]:
    ours, other = row.ours, row.other
    dtype = "" if ours["dtype"] == "float32" else f", {ours['dtype']}"
    return [
        f"`{ours['op']}`{dtype}",
        shape_text(ours["shape"]),
        milliseconds(ours["median_ms"]),
        "—" if other is None else f"{other['provider']}, {milliseconds(other['median_ms'])}",
        factor(row.times_faster),
        "; ".join(f"{share:.2f} ({name})" for name, share in row.bounds.items()),
        size(ours["peak_bytes"]),
        size(other["peak_bytes"] if other else None),
        f"{100 * ours['ceiling_share']:.0f} %",
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def speed_markdown(results: Mapping[str, Any], rows_an_op: int | None = None) -> str:
    """The table of one device, when it was measured, who could not take part, and where ours is not the fastest."""
    absent = dict(results.get("not_installed", {}))
    for record in results["records"]:
        absent |= record.get("absent", {})
    wrong = sorted({f"{r['provider']} at {r['op']} ({r['fault']})" for r in results["records"] if not r["checked"]})
    notes = [f"Measured on {results['date']}, {results['device']}, with `{results.get('command', 'make bench')}`."]
    if absent:
        notes.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in sorted(absent.items())) + ".")
    if wrong:
        notes.append("Another answer than the reference, so no time: " + "; ".join(wrong) + ".")
    kept: list[Row] = []
    found = summary(results["records"])
    slower = [
        f"{', '.join(cells(row)[:2])} ({factor(row.times_faster)})" for row in found if (row.times_faster or 1) < 1
    ]
    if slower:
        notes.append("Another program is faster: " + "; ".join(slower) + ".")
    for row in found:
        if rows_an_op is None or sum(other.ours["op"] == row.ours["op"] for other in kept) < rows_an_op:
            kept.append(row)
    return markdown(HEADER, map(cells, kept)) + "\n\n" + " ".join(notes)


def load_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every results file of the ops in a folder, by file name; a folder that is not there has none."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("records"):
            found[path.name] = content
    return found


def beside(record: Record, committed: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the committed results say of the figure of `record`: a line a device."""
    lines = []
    for results in committed:
        same = [r for r in results["records"] if all(r[key] == record[key] for key in ("op", "shape", "dtype"))]
        for row in summary(same):
            other = "" if row.other is None else f", {factor(row.times_faster)} of {row.other['provider']}"
            lines.append(f"{results['device']}, {results['date']}: {milliseconds(row.ours['median_ms'])}{other}")
    return lines


def describe(records: Sequence[Record], committed: Iterable[Mapping[str, Any]]) -> list[str]:
    """One figure in lines of text: every provider, and what was measured elsewhere."""
    first = records[0]
    lines = [f"{first['op']}, {shape_text(first['shape'])}, {first['dtype']}"]
    for record in records:
        took = milliseconds(record["median_ms"]) if record["checked"] else f"no time: {record['fault']}"
        lines.append(f"    {record['provider']:34s}{took:>12s}{size(record['peak_bytes']):>12s}")
    for row in summary(records):
        if row.times_faster is not None and row.other is not None:
            lines.append(f"    {factor(row.times_faster)} as fast as {row.other['provider']}")
    return lines + [f"    measured on {line}" for line in beside(first, committed)]
