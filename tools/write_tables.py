"""Write the tables of the README and of the docs from the measured results, and the copy of the results that the package
carries.

    python tools/write_tables.py            # after `sparsefeat evaluate emoji` or `overhead`, `make bench`, `bench.itd`, ...
    python tools/write_tables.py --check    # exit code 1 if a page is not what the results say

Each table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test runs the check.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparsefeat.evaluation.card.tables import COLUMNS, card_header, card_markdown
from sparsefeat.evaluation.results import STALE, stale
from sparsefeat.evaluation.scenes import COSTED
from sparsefeat.measure.speed_table import (
    A_TABLES_ROWS_AN_OP,
    factor,
    load_results,
    milliseconds,
    shape_text,
    speed_markdown,
    summary,
)
from sparsefeat.training import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(
    ROOT / f"{name}.md"
    for name in ("README", *(f"docs/{page}" for page in ("attention", "benchmarks", "card", "embedded", "training")))
)
MEASURED = ROOT / "bench" / "results"
CARRIED = ROOT / "sparsefeat" / "assets" / "results"
EMOJI, OVERHEAD, ITD = "emoji.json", "overhead.json", "itd.json"
CODECS, OPTIMIZERS = "codecs.json", "optimizers.json"
SCENES, OF_UNET, OF_JOINT = "scenes.json", "unet_saes.json", "joint_saes.json"
MAPS = "maps.json"
CARD = "card.json"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def where(results: dict[str, Any], command: str = "sparsefeat evaluate emoji") -> str:
    return f"Measured on {results['date']}, {results['device']}, with `{command}`."


def generation(results: dict[str, Any]) -> str:
    judge, drawn = results["judge"], results["generation"]
    rows = [
        ["real drawings, augmentations it has not seen", percent(judge["object_accuracy"]), percent(judge["style_accuracy"])],
        *(
            [f"real drawings of {vendor}, trained without that vendor's", percent(seen["object_accuracy"]), "–"]
            for vendor, seen in judge["report"]["unseen_vendor"].items()
        ),
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
            *(
                f"{percent(s[f'{kind}_accuracy_unedited'])} → {percent(s[f'{kind}_accuracy_spliced'])}"
                for kind in ("object", "style")
            ),
        ]
        for s in results["saes"]
    ]
    head = [
        "hookpoint",
        "size",
        "FVU",
        "FVU, PCA with k",
        "FVU, random SAE",
        "dead",
        "object right, spliced in",
        "style right",
    ]
    return table(head, rows) + "\n\n" + where(results)


def before_after(row: dict[str, Any]) -> list[str]:
    """What the judge saw before and after; nothing where that was not yet counted."""
    n = row.get("before_after")
    if n is None:
        return []
    return [
        f"{n['seen_before']} → {n['seen_after']} of {n['n_targets']}",
        f"{n['right_before']} → {n['right_after']} of {n['n_others']}",
    ]


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
            *before_after(r),
        ]
        for r in results["erasure"]
    ]
    counts = {r["target_kind"]: (r["n_targets"], r["n_images"]) for r in results["erasure"]}
    note = "; ".join(f"{n} {kind}s, {images} images a row" for kind, (n, images) in counts.items())
    head = ["erased", "method", "UA", "IRA", "CRA", "mean", "of what is possible", "Fréchet"]
    if "before_after" in results["erasure"][0]:
        head += ["target seen, before → after", "others right, before → after"]
    return f"{table(head, rows)}\n\n{note[0].upper()}{note[1:]}. {where(results)}"


def overhead(o: dict[str, Any]) -> str:
    rows = [
        [
            f"`{row['instrument']}`",
            f"{row['hook_ms']:.0f} ms",
            f"{row['step_ms']:.0f} ms",
            percent(row["share_of_step"]),
        ]
        for row in o["rows"]
    ]
    size = f"At `{o['hookpoint']}`, {o['n_latents']:,} latents, k = {o['k']}."
    header = ["attached", "hook", "step", "share, median"]
    return table(header, rows) + f"\n\n{size} {where(o, 'sparsefeat evaluate overhead')}"


def itd(results: dict[str, Any]) -> str:
    rows = [
        [r["way"], f"{r['median_s']:.1f} s", f"{r['first_s']:.1f} s", f"{r['peak_bytes'] / 2**20:,.0f} MiB"]
        for r in results["rows"]
    ]
    header = ["selection", "median", "the first time", "memory beyond the weights"]
    return table(header, rows) + f"\n\n{where(results, 'python -m bench.itd')}"


def codecs(results: dict[str, Any]) -> str:
    def number(one: dict[str, Any], name: str, form: str = ".3f") -> str:
        value = one.get(name)
        return "–" if value is None else format(value, form)

    rows = []
    for name, one in {**results["codecs"], **results["controls"]}.items():
        if name == "ablation":
            continue
        stable = one.get("stability", {}).get("cosine")
        rows.append(
            [
                name,
                number(one, "fvu"),
                number(one, "cosine"),
                number(one, "l0", ".2f") + (f" ({one['trained_to']:.3g})" if one.get("trained_to") else ""),
                number(one, "dead", ".1%"),
                number(one, "dense", ".1%"),
                number(one, "recovered_mean_overall"),
                number(one, "image_change"),
                f"{one['probe_1']:.2f}, {one['probe_5']:.2f}",
                f"{one['separability']:.3f} ± {one['separability_interval']:.3f}",
                number(one, "named", ".0%"),
                number(one, "word_auc", ".2f"),
                "–" if stable is None else f"{stable:.2f}",
            ]
        )
    head = ["codec", "FVU", "cosine", "L0", "dead", "dense", "loss recovered", "image change", "probe of 1, of 5", "separability"]  # fmt: skip
    head += ["named", "word AUC", "stability"]
    size = (
        f"At `{results['hookpoint']}`: {results['n_latents']} latents, {results['k']} active, {results['steps']} steps of "
        f"{results['batch_size']} rows, {results['held_out_rows']:,} held-out rows, {results['images']} images."
    )
    parts = [size, where(results, "python -m bench.codecs"), *([results["note"]] if "note" in results else [])]
    return f"{table(head, rows)}\n\n{' '.join(parts)}"


def recipes() -> str:
    rows = [[f"`{name}`", one.source, f"{one.n} × d", str(one.k)] for name, one in PUBLISHED.items()]
    return table(["`--preset`", "from", "latents", "active"], rows)


def trained(results: dict[str, Any], command: str) -> str:
    rows = [
        [f"`{s['hookpoint']}`", f"{s['fvu']:.3f}", f"{s['fvu_pca']:.3f}", percent(s["dead"])] for s in results["saes"]
    ]
    cost = f"{results['processor_seconds'] / 60:.0f} minutes of processor time, drawing included."
    return f"{table(['hookpoint', 'FVU', 'FVU, PCA with k', 'dead'], rows)}\n\n{cost} {where(results, command)}"


def scenes(results: dict[str, Any]) -> str:
    rows = [
        [row["pipeline"], row["split"], row["method"], *_scored(row)]
        for row in results["rows"]
        if row.get("miou") is not None or "note" in row
    ]
    head = [
        "pipeline",
        "pictures",
        "maps",
        "mIoU",
        "of the oracle's",
        "of it on trained pairs",
        "accuracy",
        "mAP",
        "s",
        "MB",
    ]
    without = ", ".join(
        f"{row['pipeline']}, {row['split']}: {row['seconds']:.2f} s"
        for row in results["rows"]
        if row["method"] == "no maps"
    )
    n = results["n_pictures"]
    size = (
        f"{n} pictures of each kind; seconds of processor time a picture, megabytes of {COSTED} at once; a call without maps "
        f"takes: {without}."
    )
    return f"{table(head, rows)}\n\n{size} {where(results, f'sparsefeat evaluate scenes --images {n}')}"


def maps_cost(results: dict[str, Any]) -> str:
    cost = results["cost"]
    rows = [
        [
            row["case"],
            row["method"],
            f"{1000 * row['map_seconds']:.1f} ms",
            f"{100 * row['share_of_step']:.2f} %",
            percent(row["share_of_attention"]),
            f"{row['peak_bytes'] / 1e6:.1f} MB" if "peak_bytes" in row else "–",
        ]
        for row in cost["rows"]
        if row["method"] != "none"
    ]
    head = ["run", "maps of", "time", "of the run", "of the attention they watch", "memory beyond the run's"]
    return f"{table(head, rows)}\n\n{where(cost, cost['command'])}"


def _scored(row: dict[str, Any]) -> list[str]:
    if "note" in row:
        return [f"refuses: {row['note'].partition(chr(10))[0]}", *[""] * 6]
    return [
        f"{row['miou']:.3f}",
        f"{row['share_of_oracle']:.1%}",
        f"{row['fit_share_of_oracle']:.1%}",
        f"{row['accuracy']:.3f}",
        f"{row['map']:.3f}",
        f"{row['seconds']:.2f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]


def optimizers(results: dict[str, Any]) -> str:
    rates = sorted({run["lr"] for run in results["runs"]})
    found = {(run["hookpoint"], run["optimizer"], run["lr"]): run["fvu"] for run in results["runs"]}
    rows = [
        [f"`{place}`", optimizer, *(f"{found[place, optimizer, lr]:.3f}" for lr in rates)]
        for place in dict.fromkeys(run["hookpoint"] for run in results["runs"])
        for optimizer in ("adam", "muon")
    ]
    size = f"FVU on held-out rows after {results['steps']} steps of {results['batch_size']:,} rows."
    return f"{table(['hookpoint', 'optimiser', *(f'lr {lr:g}' for lr in rates)], rows)}\n\n{size} {where(results, 'python -m bench.optimizers')}"


def tuned(name: str) -> bool:
    """Whether a results file is of a second run, by the tuning table that the first ended with."""
    return Path(name).stem.endswith("-tuned")


def speed(devices: dict[str, dict[str, Any]]) -> str:
    """A table a device that was measured; a device that nobody measured has none."""
    parts = []
    for name, results in devices.items():
        full = f"All shapes and programs: `bench/results/{Path(name).with_suffix('.md')}`."
        table_of = ", with its tuning table" if tuned(name) else ""
        parts.append(f"**{results['device']}{table_of}**\n\n{speed_markdown(results, A_TABLES_ROWS_AN_OP)} {full}")
    return "\n\n".join(parts) or "No device was measured yet: `make bench`."


# The README's few: op, and what it is for. Where another program is faster, that is among them.
FAST = {
    "topk_encode": "encode with a top-k SAE",
    "threshold_encode": "encode with a threshold",
    "training_step": "a training step",
    "attention_tap": "heat maps of joint attention",
    "attention_map": "heat maps of cross-attention",
}


def fast(devices: dict[str, dict[str, Any]]) -> str:
    """The first figure of each op of `FAST`, on the first device that was measured."""
    if not devices:
        return "No device was measured yet: `make bench`."
    results = next(iter(devices.values()))
    first: dict[str, Any] = {}
    for row in summary(results["records"]):
        if row.other is not None:
            first.setdefault(row.ours["op"], row)
    rows = [
        [
            what,
            shape_text(first[op].ours["shape"]),
            milliseconds(first[op].ours["median_ms"]),
            f"{first[op].other['provider']}, {milliseconds(first[op].other['median_ms'])}",
            factor(first[op].times_faster),
        ]
        for op, what in FAST.items()
        if op in first
    ]
    head = ["what", "size", "sparsefeat", "fastest other", "times faster"]
    return f"{table(head, rows)}\n\n{where(results, results.get('command', 'make bench'))}"


def throughput() -> str:
    """What `python -m bench.training` wrote, a device after the other."""
    pages = sorted(MEASURED.glob("training-*.md"))
    parts = [said(page.read_text().strip(), json.loads(page.with_suffix(".json").read_text())) for page in pages]
    return "\n\n".join(parts) or "Not measured yet."


# Table: the file it is made from, and how.
TABLES = {
    "generation": (EMOJI, generation),
    "saes": (EMOJI, saes),
    "erasure": (EMOJI, erasure),
    "overhead": (OVERHEAD, overhead),
    "itd": (ITD, itd),
    "codecs": (CODECS, codecs),
    "optimizers": (OPTIMIZERS, optimizers),
    "unet-saes": (OF_UNET, partial(trained, command="python tools/train_saes.py")),
    "joint-saes": (OF_JOINT, partial(trained, command="python tools/train_saes.py --pipeline sparsefeat/assets/joint")),
    "scenes": (SCENES, scenes),
    "maps-cost": (MAPS, maps_cost),
    "card": (CARD, card_header),
    **{f"card-{section}": (CARD, partial(card_markdown, section=section)) for section in COLUMNS},
}


# Those of the embedded pipeline that say so where it is another by now; of the card the first does.
OF_THE_PIPELINE = ("generation", "saes", "erasure", "codecs", "optimizers", "unet-saes", "joint-saes", "scenes", "card")


def said(content: str, results: dict[str, Any]) -> str:
    return f"{content} {STALE}" if stale(results) else content


def filled_table(name: str) -> str:
    file, make = TABLES[name]
    if not (MEASURED / file).is_file():
        return "Not measured yet."
    results = json.loads((MEASURED / file).read_text())
    return said(make(results), results) if name in OF_THE_PIPELINE else make(results)


def filled(text: str, devices: dict[str, dict[str, Any]]) -> str:
    contents = {name: filled_table(name) for name in TABLES}
    contents |= {"speed": speed(devices), "fast": fast(devices), "recipes": recipes(), "throughput": throughput()}
    for name, content in contents.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
        text = pattern.sub(lambda m, content=content: m.group(1) + content + m.group(2), text)
    return text


def carried(devices: dict[str, dict[str, Any]]) -> Iterator[tuple[Path, Path]]:
    """The files that the package carries a copy of, and the copies."""
    for name in (EMOJI, OVERHEAD, *(name for name in devices if not tuned(name))):
        yield MEASURED / name, CARRIED / name


def main() -> None:
    devices = load_results(MEASURED)
    pages = {page: filled(page.read_text(), devices) for page in PAGES}
    if "--check" in sys.argv[1:]:
        stale = [
            source.name
            for source, copy in carried(devices)
            if not copy.is_file() or copy.read_text() != source.read_text()
        ]
        stale += [page.name for page, wanted in pages.items() if page.read_text() != wanted]
        if stale:
            raise SystemExit(f"{', '.join(stale)}: not what bench/results says; run `python tools/write_tables.py`")
        return
    for page, wanted in pages.items():
        page.write_text(wanted)
    CARRIED.mkdir(parents=True, exist_ok=True)
    for source, copy in carried(devices):
        copy.write_text(source.read_text())
    print(f"tables written into {', '.join(page.name for page in pages)}")


if __name__ == "__main__":
    main()
