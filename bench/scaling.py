"""How the cost grows: `python -m bench.scaling`. One axis at a time, rows, n_latents, k, d_model, around SAeUron's shape.

Beside every measured line stands what the machine's ceilings say it should cost,

    product    2 rows n_latents d_model FLOPs at the rate of a large product
    selection  reading [rows, n_latents] pre-activations once, at the rate of a large copy
    gather     rows k rows of W_dec of d_model values, at the same rate (the forward only)

Where the line leaves the model there is something to gain, or a cache that the model does not know of. Writes
bench/results/scaling-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench.measure import measure_ceilings
from bench.run import RESULTS, file_name
from sparsefeat.measure.figures import build
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import OURS, Ceilings, measure, with_providers
from sparsefeat.whole import write_json

CENTRE = {"rows": 512, "d_model": 1280, "n_latents": 20480, "k": 32}
SWEEPS = {
    "rows": (32, 128, 512, 2048),
    "n_latents": (1280, 5120, 20480, 81920),
    "k": (8, 32, 128, 512),
    "d_model": (320, 640, 1280, 2560),
}
OPS = ("topk_encode", "forward")


def model_ms(op: str, shape: Mapping[str, int], ceilings: Ceilings, dtype: str) -> dict[str, float]:
    """Milliseconds of each part of the model; their sum is the line."""
    rows, d, n, k = (shape[name] for name in ("rows", "d_model", "n_latents", "k"))
    parts = {
        "product": 2 * rows * n * d / ceilings.product[dtype],
        "selection": 4 * rows * n / ceilings.copy,
    }
    if op == "forward":
        parts["gather"] = rows * k * d * getattr(torch, dtype).itemsize / ceilings.copy
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def sweep(
    device: str, dtype: str, seconds: float, budget: float, centre: Mapping[str, int] = CENTRE,
    sweeps: Mapping[str, tuple[int, ...]] = SWEEPS, ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A point a value of every axis and op, until the budget is spent."""
    deadline = time.perf_counter() + budget
    ceilings = ceilings or measure_ceilings(device)
    points = []
    for axis, values in sweeps.items():
        for value in values:
            shape = {**centre, axis: value}
            for op in OPS:
                if time.perf_counter() > deadline:
                    continue
                figure = with_providers(build(op, shape, dtype, device), OURS)
                record = measure(figure, ceilings, seconds, peaks=False)[0]
                points.append(
                    {
                        "axis": axis,
                        "value": value,
                        "model_ms": model_ms(op, shape, ceilings, dtype),
                        **{name: record[name] for name in ("op", "shape", "dtype", "median_ms", "p20_ms", "p80_ms")},
                        **{
                            name: record[name]
                            for name in ("checked", "fault", "device", "date", "versions", "ceilings")
                        },
                    }
                )
                print(f"{op} {axis} = {value}: {record['median_ms']}", flush=True)
    return points


def draw(points: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    figure, panels = plt.subplots(1, len(axes_names), figsize=(3.4 * len(axes_names), 3.6), sharey=True, squeeze=False, layout="constrained")  # fmt: skip
    for panel, axis in zip(panels[0], axes_names, strict=True):
        for op, colour in zip(OPS, ("tab:blue", "tab:orange"), strict=True):
            own = [p for p in points if p["axis"] == axis and p["op"] == op and p["median_ms"] is not None]
            if not own:
                continue
            values = [p["value"] for p in own]
            panel.plot(values, [p["median_ms"] for p in own], "o-", color=colour, label=op)
            panel.fill_between(values, [p["p20_ms"] for p in own], [p["p80_ms"] for p in own], color=colour, alpha=0.2)
            panel.plot(values, [sum(p["model_ms"].values()) for p in own], "--", color=colour, label=f"{op}, model")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(sorted({p["value"] for p in points if p["axis"] == axis}))
        panel.xaxis.set_major_formatter("{x:,.0f}")
        panel.xaxis.set_minor_locator(plt.NullLocator())
        panel.grid(alpha=0.3, which="both")
    panels[0][0].set_ylabel("ms")
    panels[0][0].legend(fontsize=7)
    figure.suptitle(f"{points[0]['device']}, {points[0]['date']}, {points[0]['dtype']}; dashed: product + selection + gather", fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=240.0, metavar="SECONDS", help="begin no point after this long")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    points = sweep(device, dtype, 0.3 if device == "cuda" else 1.5, arguments.budget)
    path = arguments.out / f"scaling-{file_name(device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    # "points" and not "records": tables of speed are not made from this file.
    write_json(path, {"device": device_name(), "points": points})
    draw(points, path.with_suffix(".png"))
    print(f"wrote {path} and its .png")


if __name__ == "__main__":
    main()
