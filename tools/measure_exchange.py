"""Measure `Exchange` alone, and put its rows into bench/results/emoji.json beside those that `sparsefeat evaluate emoji` wrote
for the same pipeline: 2,250 images, eight minutes of one core. What it writes is what the whole command would.

    python tools/measure_exchange.py && python tools/write_tables.py
"""

from __future__ import annotations

import json

from train_autoencoder import ROOT

from sparsefeat.assets import GUIDANCE, N_STEPS, load_pipeline, text_encoder_sae_folder
from sparsefeat.evaluation.emoji import EmojiBenchmark, all_targets, allowed_mean, real_features
from sparsefeat.evaluation.judge import load_judge
from sparsefeat.evaluation.run_emoji import (
    EXCHANGE_LATENTS,
    OBJECT,
    STYLE,
    TEXT_ENCODER,
    Eraser,
    validation_targets,
)
from sparsefeat.sae import load_sae
from sparsefeat.whole import write_json

RESULTS = ROOT / "bench" / "results" / "emoji.json"
NAME = "exchange"


def main() -> None:
    results = json.loads(RESULTS.read_text())
    pipe, judge = load_pipeline(), load_judge()
    bench = EmojiBenchmark(pipe, judge, ROOT / "build" / "evaluation", n_steps=N_STEPS, guidance=GUIDANCE)
    eraser = Eraser(pipe, [load_sae(text_encoder_sae_folder())], [TEXT_ENCODER], {})
    real = real_features(judge)
    before = [row for row in results["erasure"] if row["method"] == "unedited"]
    rest = [row for row in results["erasure"] if row["method"] not in ("unedited", NAME)]
    rows = []
    for kind in (STYLE, OBJECT):
        best, means = bench.choose([eraser.exchange(n) for n in EXCHANGE_LATENTS], validation_targets(kind))
        results["validation"][kind][NAME] = best.name
        results["validation"][kind]["means"] |= means
        row = bench.row(NAME, kind, {t: best for t in all_targets() if t.kind == kind}, real)
        (unedited,) = (one for one in before if one["target_kind"] == kind)
        row["share_of_allowed"] = row["mean"] / allowed_mean(unedited)
        rows.append(row)
        print(f"{kind}: UA {row['ua']:.3f} IRA {row['ira']:.3f} CRA {row['cra']:.3f}, {row['share_of_allowed']:.1%}")
    results["erasure"] = [*before, *rows, *rest]
    write_json(RESULTS, results)


if __name__ == "__main__":
    main()
