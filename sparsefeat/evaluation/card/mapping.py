"""Maps × {mIoU, pointing}: the rows of `sparsefeat evaluate scenes`, with intervals."""

from __future__ import annotations

from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.pixel_judge import load_pixel_judge
from sparsefeat.evaluation.run_scenes import SCORED, evaluate_scenes


def maps_rows(bench: Bench) -> list[Row]:
    """Every kind of map that the pipeline has, chance, and a latent an object of two SAEs."""
    saes = [bench.block_sae, bench.cross_saes[-1]]
    found = evaluate_scenes(bench.pipe, "embedded", load_pixel_judge(), saes, bench.budget.n_pictures, bench)
    rows = []
    for row in found:
        if row.get("miou") is None:  # other packages that are not installed or refuse, and the call without maps
            continue
        for metric in ("miou", "pointing"):
            name = "mIoU" if metric == "miou" else metric
            ci = tuple(row[f"{metric}_ci"])
            rows.append(Row("maps", row["method"], row["split"], name, row[metric], ci, row["n_maps"], SCORED))
    return rows
