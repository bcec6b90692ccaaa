"""Write the README's tables from the measured results, and the copy of the results that the package carries.

    python tools/write_tables.py            # after `sparsefeat evaluate emoji`
    python tools/write_tables.py --check    # exit code 1 if the README is not what the results say

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test runs the check.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results" / "emoji.json"
CARRIED = ROOT / "sparsefeat" / "assets" / "results" / "emoji.json"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def where(results: dict[str, Any]) -> str:
    return f"Measured on {results['date']}, {results['device']}, with `sparsefeat evaluate emoji`."


def generation(results: dict[str, Any]) -> str:
    judge, drawn = results["judge"], results["generation"]
    rows = [
        ["real drawings, augmentations it has not seen", percent(judge["object_accuracy"]), percent(judge["style_accuracy"])],
        [f"{drawn['n_images']} generated images, the whole grid", percent(drawn["object_accuracy"]), percent(drawn["style_accuracy"])],
    ]  # fmt: skip
    return table(["judged", "object right", "style right"], rows) + "\n\n" + where(results)


def saes(results: dict[str, Any]) -> str:
    rows = [
        [
            f"`{s['hookpoint']}`",
            f"{s['n_latents']} × {s['d_model']}, k = {s['k']}",
            f"{s['fvu']:.3f}",
            f"{s['fvu_pca']:.3f}",
            f"{s['fvu_random']:.3f}",
            percent(s["dead_share"]),
            f"{percent(s['object_accuracy_unedited'])} → {percent(s['object_accuracy_spliced'])}",
        ]
        for s in results["saes"]
    ]
    head = ["hookpoint", "size", "FVU", "FVU, PCA with k", "FVU, random SAE", "dead", "object accuracy, spliced in"]
    return table(head, rows) + "\n\n" + where(results)


def erasure(results: dict[str, Any]) -> str:
    rows = [
        [
            r["target_kind"],
            r["method"],
            percent(r["ua"]),
            percent(r["ira"]),
            percent(r["cra"]),
            percent(r["mean"]),
            percent(r["share_of_allowed"]),
            f"{r['frechet']:.2f}",
        ]
        for r in results["erasure"]
    ]
    counts = {r["target_kind"]: (r["n_targets"], r["n_images"]) for r in results["erasure"]}
    note = "; ".join(f"{n} {kind}s, {images} images a row" for kind, (n, images) in counts.items())
    head = ["erased", "method", "UA", "IRA", "CRA", "mean", "of what is possible", "Fréchet"]
    return f"{table(head, rows)}\n\n{note[0].upper()}{note[1:]}. {where(results)}"


def overhead(results: dict[str, Any]) -> str:
    o = results["overhead"]
    row = [
        f"`{o['hookpoint']}`, {o['n_latents']:,} latents, k = {o['k']}",
        f"{o['hook_ms']:.0f} ms",
        f"{o['step_ms']:.0f} ms",
        percent(o["share_of_step"]),
    ]
    return table(["`Steer(scale=…)` at", "hook", "step", "share, median"], [row]) + f"\n\n{where(results)}"


TABLES = {"generation": generation, "saes": saes, "erasure": erasure, "overhead": overhead}


def filled(text: str, results: dict[str, Any]) -> str:
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        content = make(results)
        text = pattern.sub(lambda m, content=content: m.group(1) + content + m.group(2), text)
    return text


def main() -> None:
    raw = RESULTS.read_text()
    results = json.loads(raw)
    text = README.read_text()
    wanted = filled(text, results)
    if "--check" in sys.argv[1:]:
        stale = [str(p.relative_to(ROOT)) for p, t in ((README, wanted), (CARRIED, raw)) if p.read_text() != t]
        if stale:
            raise SystemExit(f"{', '.join(stale)} is not what {RESULTS.name} says; run `python tools/write_tables.py`")
        return
    README.write_text(wanted)
    CARRIED.parent.mkdir(parents=True, exist_ok=True)
    CARRIED.write_text(raw)
    print(f"tables written into {README.name}")


if __name__ == "__main__":
    main()
