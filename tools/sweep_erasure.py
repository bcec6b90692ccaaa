"""Try erasure hyperparameters on validation noise: how many latents, how strongly, at which SAEs.

    python tools/sweep_erasure.py 16=-0.5 32=-0.5                 # the embedded SAE of the text encoder
    python tools/sweep_erasure.py --saes build/other 16=-10       # SAEs that `train_saes.py --out build/other` wrote

Each argument is LATENTS=GAMMA. Prints UA, IRA, CRA and their mean over two styles and four objects, 12 images each.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from train_autoencoder import ROOT

from sparsefeat.assets import GUIDANCE, N_STEPS, embedded_fingerprint, load_pipeline, text_encoder_sae_folder
from sparsefeat.evaluation.emoji import EmojiBenchmark, Scores, all_targets, scores, tasks_for
from sparsefeat.evaluation.generation import VALIDATION
from sparsefeat.evaluation.judge import load_judge
from sparsefeat.evaluation.run_emoji import Eraser, Recipe, collect_grid_statistics
from sparsefeat.sae import load_sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="+", metavar="LATENTS=GAMMA")
    parser.add_argument("--saes", type=Path, nargs="+", help="SAE folders, or one folder of them")
    parser.add_argument("--error", choices=("keep", "saeuron_released"), default="keep")
    arguments = parser.parse_args()
    folders = arguments.saes or [text_encoder_sae_folder()]
    if len(folders) == 1 and not (folders[0] / "config.json").is_file():
        folders = sorted(path.parent for path in folders[0].glob("*/config.json"))
    saes = [load_sae(folder) for folder in folders]
    pipe = load_pipeline()
    name = "-".join(folder.name for folder in folders)
    work = ROOT / "build" / "sweep" / embedded_fingerprint() / (name if len(name) < 200 else str(len(folders)))
    bench = EmojiBenchmark(pipe, load_judge(), work, n_steps=N_STEPS, guidance=GUIDANCE, progress=False)
    eraser = Eraser(pipe, saes, ["all"] * len(saes), collect_grid_statistics(pipe, saes, work / "statistics"))
    targets = [all_targets()[i] for i in (0, 3, 4, 9, 15, 21)]
    print("error, latents, gamma: UA IRA CRA mean, of styles | of objects")
    for text in arguments.recipes:
        n_latents, _, gamma = text.partition("=")
        recipe = Recipe("all", int(n_latents), float(gamma))
        method = eraser.saeuron(recipe, arguments.error)
        measured: dict[str, list[Scores]] = {"style": [], "object": []}
        for target in targets:
            tasks = tasks_for(target, VALIDATION, n_target=6, n_other=6)
            measured[target.kind].append(scores(bench.unit(method, target, tasks, "sweep"), target, tasks))
        means = [
            " ".join(f"{sum(getattr(s, k) for s in kind) / len(kind):.2f}" for k in ("ua", "ira", "cra", "mean"))
            for kind in measured.values()
        ]
        print(f"{arguments.error}, {recipe.n_latents}, {recipe.gamma:g}: {means[0]} | {means[1]}", flush=True)


if __name__ == "__main__":
    main()
