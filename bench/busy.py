"""What the ops take beside other programs: `python -m bench.busy`, a part of `make bench`.

Every CPU op, and the bare matrix product of an SAE, in turns: on the quiet machine, then beside two other torch processes
of as many threads as there are cores, which do small element-wise ops as fast as they can. Written to
bench/results/busy-<device>.json and .md: each op's time over the bare product's, quiet and busy, and the one over the other.
1 means that an op suffers from its neighbours as the product does, which is one large piece of work. With --demo not the ops
but the whole demo, quiet and busy: some five minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.measure import OURS, Ceilings, Figure, available, measure
from bench.run import RESULTS, file_name
from sparsefeat.measure.figures import HERE, build
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.speed_table import shape_text
from sparsefeat.measure.timing import Provider, versions
from sparsefeat.whole import write_json

NEIGHBOURS = 2
# 64 Ki elements: two of torch's grains, so that every op is split over the threads.
NEIGHBOUR = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
x = torch.ones(1 << 16)
print("ready", flush=True)
while True:
    x.mul_(1.0001).clamp_(max=2.0)
"""
PRODUCT = "the bare product"
PRODUCT_SHAPE = (1024, 1280, 20480)  # rows, d_model, n_latents
NO_CEILINGS = Ceilings(1.0, {"float32": 1.0})  # shares of a ceiling are not asked for here


@contextlib.contextmanager
def neighbours(count: int = NEIGHBOURS) -> Iterator[list[subprocess.Popen[str]]]:
    """Inside the block, other torch processes keep the cores busy."""
    begun: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-c", NEIGHBOUR, str(torch.get_num_threads())]
            begun.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        for one in begun:
            assert one.stdout is not None
            if one.stdout.readline().strip() != "ready":
                raise RuntimeError(
                    f"a neighbour ended with code {one.wait()} before it began; look at its output above"
                )
        yield begun
    finally:
        for one in begun:
            one.kill()
            one.wait()
            assert one.stdout is not None
            one.stdout.close()


def beside_the_product(figure: Figure, shape: tuple[int, int, int] = PRODUCT_SHAPE) -> Figure:
    """The figure with our providers and the bare product, whatever the op is."""
    rows, d, n_latents = shape
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(size, generator=g) for size in ((rows, d), (n_latents, d), (n_latents,)))
    product = Provider(PRODUCT, lambda _: F.linear(x, W, b), check=lambda _, answer: "", bound=True)
    ours = (provider for provider in figure.providers if provider.name.startswith(OURS))
    return replace(figure, providers=(*ours, product))


def record(quiet: Mapping[str, Any], busy: Mapping[str, Any]) -> dict[str, Any]:
    """One provider's times and its ratios to the product in the same rounds."""
    ratios = {"quiet": 1 / quiet["ratio"][PRODUCT], "busy": 1 / busy["ratio"][PRODUCT]}
    return {
        "op": quiet["op"], "shape": quiet["shape"], "dtype": quiet["dtype"], "provider": quiet["provider"],
        "quiet_ms": quiet["median_ms"], "busy_ms": busy["median_ms"], **{f"{k}_ratio": v for k, v in ratios.items()},
        "busy_over_quiet": ratios["busy"] / ratios["quiet"],
    }  # fmt: skip


def measure_busy(figures: list[Figure], seconds: float) -> list[dict[str, Any]]:
    """One record for each of our providers of every figure."""
    quiet = [measure(figure, NO_CEILINGS, seconds, peaks=False) for figure in figures]
    with neighbours():
        busy = [measure(figure, NO_CEILINGS, seconds, peaks=False) for figure in figures]
    return [
        record(before, beside)
        for pair in zip(quiet, busy, strict=True)
        for before, beside in zip(*pair, strict=True)
        if before["provider"] != PRODUCT and before["checked"] and beside["checked"]
    ]


def demo_seconds() -> float:
    """Of `sparsefeat demo`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "sparsefeat.cli", "demo", "--out", str(Path(folder) / "demo")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return time.perf_counter() - began


def measure_demo() -> dict[str, float]:
    quiet = demo_seconds()
    with neighbours():
        busy = demo_seconds()
    return {"quiet_s": quiet, "busy_s": busy, "busy_over_quiet": busy / quiet}


def table(content: Mapping[str, Any]) -> str:
    lines = [
        "| op | shape | quiet | busy | quiet / product | busy / product | busy / quiet |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in content["ratios"]:
        kept = r["provider"].removeprefix(OURS)
        lines.append(
            f"| `{r['op']}`{kept} | {shape_text(r['shape'])} | {r['quiet_ms']:.1f} ms | {r['busy_ms']:.1f} ms | "
            f"{r['quiet_ratio']:.2f} | {r['busy_ratio']:.2f} | {r['busy_over_quiet']:.2f} |"
        )
    demo = content.get("demo")
    if demo is not None:
        lines += [
            "",
            f"The demo (`python -m bench.busy --demo`): {demo['quiet_s']:.0f} s quiet, {demo['busy_s']:.0f} s busy, "
            f"{demo['busy_over_quiet']:.2f} times as long.",
        ]
    rows, d, n = PRODUCT_SHAPE
    return "\n".join(
        [
            *lines,
            "",
            f"The product: {rows:,} rows, {d:,} → {n:,}. Measured on {content['date']}, {content['device']}, beside "
            f"{content['neighbours']} torch processes, with `{content['command']}`.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.busy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="OP", choices=available(), nargs="+", help="measure these ops")
    parser.add_argument("--demo", action="store_true", help="measure the demo, and keep the figures of the ops")
    parser.add_argument("--seconds", type=float, default=2.0, help="of rounds, an op, quiet and busy each (default 2)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"busy-{file_name(device_name())}.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    kept = {key: before[key] for key in ("ratios", "demo") if key in before}
    if arguments.demo:
        new: dict[str, Any] = {"demo": measure_demo()}
    else:
        wanted = [op for op in available() if arguments.only is None or op in arguments.only]
        figures = [beside_the_product(build(op, HERE[op], "float32", "cpu")) for op in wanted]
        new = {"ratios": measure_busy(figures, arguments.seconds)}
    content = {
        "device": device_name(), "date": date.today().isoformat(), "command": "python -m bench.busy",
        "neighbours": NEIGHBOURS, "versions": versions(), "ratios": [], **kept, **new,
    }  # fmt: skip
    write_json(path, content)
    path.with_suffix(".md").write_text(table(content) + "\n")
    print(table(content))
    print(f"wrote {path} and its .md")


if __name__ == "__main__":
    main()
