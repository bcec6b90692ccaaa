"""Measure what this machine can in ten minutes: `python -m bench.run`, or `make bench`.

Writes bench/results/<device>.json after every figure, so that a run that was stopped goes on where it was; figures of
other versions, or of kernels that changed since, are measured again. Beside it a table (.md) and a plot (.png).
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import peers
from bench.measure import OURS, Ceilings, Results, available, build, measure, measure_ceilings
from bench.peers import compiled
from bench.shapes import Wanted, cpu_figures, gpu_figures
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.speed_table import figures, shape_text, speed_markdown, summary
from sparsefeat.measure.timing import with_providers

RESULTS = Path(__file__).parent / "results"


def file_name(device: str) -> str:
    """`AMD EPYC, 2 threads` -> `amd-epyc-2-threads`"""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def run(
    wanted: Iterable[Wanted], device: str, results: Results, ceilings: Ceilings, budget: float, peaks: bool = True
) -> int:
    """Measure what is not in `results`, until the budget (seconds) is spent; returns how many figures are left."""
    deadline = time.perf_counter() + budget
    left = 0
    for one in wanted:
        if one.op not in available():
            continue
        figure = build(one.op, one.shape, one.dtype, device)
        if not one.compiled:
            figure = with_providers(figure, *(p.name for p in figure.providers if p.name != compiled.NAME))
        if one.only:
            figure = with_providers(figure, *one.only)
        if results.has(figure):
            continue
        if time.perf_counter() > deadline:
            left += 1
            continue
        began = time.perf_counter()
        records = measure(figure, ceilings, one.seconds, peaks=peaks)
        results.add(figure, records)
        print(f"{figure.key}: {time.perf_counter() - began:.1f} s", flush=True)
        for record in records:
            took = f"{record['median_ms']:10.3f} ms" if record["checked"] else f"no time: {record['fault']}"
            print(f"    {record['provider']:45s}{took}", flush=True)
    return left


def write_table(results: Results) -> None:
    content = json.loads(results.path.read_text())
    results.path.with_suffix(".md").write_text(speed_markdown(content) + "\n\n" + all_providers(content) + "\n")


def all_providers(content: dict[str, Any]) -> str:
    """Every provider of every figure: time, ratio to ours, memory."""
    lines = []
    for group in figures(content["records"]):
        first = group[0]
        lines += [f"### {first['op']}, {shape_text(first['shape'])}, {first['dtype']}", ""]
        lines += [
            "| provider | median | 20th to 80th percentile | its time / ours | peak memory | |",
            "|---|---|---|---|---|---|",
        ]
        ours = next((r for r in group if r["provider"] == OURS), first)
        for r in group:
            if not r["checked"]:
                lines.append(f"| {r['provider']} | — | | | | {r['fault']} |")
                continue
            ratio = "" if r is ours else f"{ours['ratio'].get(r['provider'], float('nan')):.2f}"
            peak = "—" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f} MiB"
            spread = f"{r['p20_ms']:.3f} – {r['p80_ms']:.3f}"
            lines.append(f"| {r['provider']} | {r['median_ms']:.3f} ms | {spread} | {ratio} | {peak} | {r['note']} |")
        lines.append("")
    return "\n".join(lines)


def write_plot(results: Results) -> None:
    """Bars: how many times faster than each other program, one group a figure, on a log axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in summary(results.records) if row.ours["ratio"]]
    if not rows:
        return
    names = list(dict.fromkeys(name for row in rows for name in row.ours["ratio"] if not name.startswith(OURS)))
    colours = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.62 * len(rows)), layout="constrained")
    labels = []
    for i, row in enumerate(rows):
        ratios = [(name, row.ours["ratio"][name]) for name in names if name in row.ours["ratio"]]
        height = 0.8 / len(ratios)
        for j, (name, ratio) in enumerate(ratios):
            axes.barh(i - 0.4 + (j + 0.5) * height, ratio - 1, height, left=1, color=colours[name])
        precision = "" if row.ours["dtype"] == "float32" else f", {row.ours['dtype']}"
        labels.append(f"{row.ours['op']}{precision}\n{shape_text(row.ours['shape'])}")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("its time / sparsefeat's (right of 1: sparsefeat is faster)")
    axes.set_title(f"{results.records[0]['device']}, {results.records[0]['date']}", fontsize=9)
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names], names, fontsize=6)
    figure.savefig(results.path.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="OP", choices=available(), help="measure one op")
    parser.add_argument(
        "--budget", type=float, default=540.0, metavar="SECONDS", help="begin no figure after this long"
    )
    parser.add_argument("--again", action="store_true", help="start over: forget what was measured on this device")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    began = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{file_name(device_name())}.json"
    results = Results(path, start_over=arguments.again)
    results.not_installed = peers.load()[1]
    ceilings = measure_ceilings(device)
    print(f"{device_name()}: {ceilings.as_json()}", flush=True)
    figures_of = cpu_figures() if device == "cpu" else gpu_figures()
    wanted = [one for one in figures_of if arguments.only in (None, one.op)]
    try:
        left = run(wanted, device, results, ceilings, arguments.budget - (time.perf_counter() - began))
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what was measured is in {path}, and the same command goes on") from None
    results.write()
    write_table(results)
    write_plot(results)
    print(
        f"wrote {path} and its .md and .png" + (f"; {left} figures are left: the same command goes on" if left else "")
    )


if __name__ == "__main__":
    main()
