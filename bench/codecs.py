"""Codecs at equal sparsity on the embedded pipeline: `python -m bench.codecs` (resumable; an hour on one core).

Every codec of the table has as many latents, sees the same rows in the same order for as many steps at the same learning
rate, and is trained twice, from two seeds. ITDA, PCA and NMF are fitted to the same rows. Reconstruction is measured on
prompts that none was trained on; the rest as in `sparsefeat.evaluation.evaluate_saes`.

All are compared where K latents of the rows that are measured are active. Those rows are of other prompts than the rows
trained on, and more of a penalised SAE's latents are active there: it is trained again, with its `l0_target` scaled by
what is missing, until K are (`at_l0`, also NMF's number of parts); BatchTopK's one threshold is set to leave K. Only the
number of active latents is looked at for it, no error.

Writes bench/results/codecs.json after every codec; `python tools/write_tables.py` makes the table of docs/training.md
from it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from bench.run import RESULTS
from sparsefeat.assets import GUIDANCE, N_STEPS, embedded_fingerprint, load_pipeline
from sparsefeat.evaluation.evaluate_saes import (
    Concepts,
    Drawing,
    Splicing,
    measure_units,
    parts,
    quality,
    random_weights,
    trained_control,
)
from sparsefeat.evaluation.generation import STATISTICS, TEST, held_out, whole_grid
from sparsefeat.evaluation.results import measured_on_embedded, stale
from sparsefeat.evaluation.sae_metrics import measure_sae, random_control
from sparsefeat.evaluation.stability import stability
from sparsefeat.evaluation.units import Units, components, latents, neurons
from sparsefeat.sae import SAE
from sparsefeat.training import CollectedRows, SAETrainer, TensorRows, build_itda, factorise, recipe
from sparsefeat.whole import write_json

T = TypeVar("T")

HOOKPOINT = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"
N_LATENTS, K, STEPS, BATCH, LR = 512, 8, 1000, 1024, 2e-3
CLOSE, TRIALS = 0.03, 8  # of K; trainings of one codec until it is so close
RECIPES = {
    "TopK": "topk",
    "BatchTopK": "batch-topk",
    "Matryoshka": "matryoshka",
    "JumpReLU": "jumprelu",
    "Gated": "gated",
    "ReLU": "relu-l1",
    "RA": "ra-sae",
    "temporal-aware": "temporal-topk",
}
PENALISED = ("JumpReLU", "Gated", "ReLU")
ONE_THRESHOLD = ("BatchTopK", "Matryoshka")
SEEDS = (0, 1)


def drawing(split: int, rows_per_image: int, seen_only: bool) -> Drawing:
    prompts = [t.prompt for t in whole_grid(split) if not (seen_only and held_out(t))]
    call = {"num_inference_steps": N_STEPS, "guidance_scale": GUIDANCE}
    return Drawing(prompts, 1_000_000 * split, rows_per_image, call)


def rows_of(pipe: Any, split: int, rows_per_image: int, seen_only: bool, cache: Path) -> dict[str, Any]:
    """The drawn images and rows, once for all codecs."""
    if not cache.is_file():
        images, rows = drawing(split, rows_per_image, seen_only).rows(pipe, [HOOKPOINT])
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"images": images, **rows[HOOKPOINT].tensors()}, cache)
    return torch.load(cache, weights_only=True)


def at_l0(made: Callable[[float], tuple[T, float]]) -> tuple[T, float]:
    """What `made` makes of a setting, such that K latents are active, and the setting. made: a setting to a codec and its
    mean number of active latents, which grows with the setting."""
    setting = float(K)
    for _ in range(TRIALS):
        one, l0 = made(setting)
        print(f"  trained to {setting:.2f}: {l0:.2f} active", flush=True)
        if abs(l0 / K - 1) <= CLOSE:
            return one, setting
        setting *= K / l0
    raise RuntimeError(f"no setting of {TRIALS} came to {K} active latents within {CLOSE:.0%}; the last gave {l0:.2f}")


@torch.no_grad()
def leave_k(sae: SAE, rows: Tensor) -> SAE:
    """Set the one threshold of a BatchTopK SAE so that K latents a row are active, on average over `rows`."""
    assert sae.threshold is not None
    largest = sae.encode(rows, k=N_LATENTS // 4).values.flatten()
    sae.threshold.copy_(largest.topk(K * len(rows) + 1).values[-1])
    return sae


def trained(name: str, rows: TensorRows, seed: int, active: float = K) -> SAE:
    """active: latents a row, on the rows trained on."""
    d_model = rows.d_model
    options: dict[str, Any] = {"hookpoint": HOOKPOINT}
    if name == "temporal-aware":
        options["time_width"] = d_model
    pieces: dict[str, Any] = {"dead_after": 100 * BATCH}
    if name in PENALISED:
        pieces["l0_target"] = active
    if name == "ReLU":
        pieces["sparsity"] = 1e-2
    if (
        name == "JumpReLU"
    ):  # the published 1 is for a hundred times the steps: thresholds are still falling behind it here
        pieces["sparsity"] = 10.0
    if name == "RA":
        pieces["archetypes"] = N_LATENTS
    made = recipe(
        RECIPES[name],
        d_model,
        n_latents=N_LATENTS,
        k=K,
        steps=STEPS,
        sae=options,
        objective=pieces,
        lr=LR,
        batch_size=BATCH,
        warmup_steps=50,
        grad_clip=1.0,
        seed=seed,
    )
    torch.manual_seed(seed)
    return SAETrainer(SAE(made.sae), rows, made.train).fit(progress=False)


def itda(rows: Tensor, seed: int) -> SAE:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return build_itda(rows[order].split(4096), N_LATENTS, K, hookpoint=HOOKPOINT)


def pca(rows: Tensor, seed: int) -> SAE:
    """The K directions of most variance, all of which are always active; the same from any seed."""
    return factorise(rows, K, "pca", hookpoint=HOOKPOINT)


def nmf(rows: Tensor, n_parts: float) -> SAE:
    """The same from any seed; of every so-manieth row, 16,384 to 32,767 in all."""
    return factorise(rows[:: max(1, len(rows) // 16_384)], round(n_parts), "nmf", hookpoint=HOOKPOINT)


def run(out: Path, work: Path) -> None:
    pipe, work = load_pipeline(), work / embedded_fingerprint()
    seen = rows_of(pipe, STATISTICS, 40, True, work / "seen.pt")
    tests = drawing(TEST, 8, False)
    drawn = rows_of(pipe, TEST, 8, False, work / "test.pt")
    images = drawn.pop("images")

    rows = CollectedRows(**drawn)
    concepts = Concepts.of_prompts(tests.prompts)
    unseen = torch.tensor([held_out(t) for t in whole_grid(TEST)])
    held, fitted = parts(rows, ~unseen)
    source = TensorRows(seen["rows"], None, seen["timestep"])
    results: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    if stale(results):
        results = {}
    results |= {
        **measured_on_embedded(),
        "hookpoint": HOOKPOINT,
        "n_latents": N_LATENTS,
        "k": K,
        "steps": STEPS,
        "batch_size": BATCH,
        "lr": LR,
        "training_rows": source.n_rows,
        "held_out_rows": len(held.rows),
        "images": len(images),
        "words": len(concepts.words),
    }
    codecs, controls = results.setdefault("codecs", {}), results.setdefault("controls", {})
    splicing = Splicing(pipe, HOOKPOINT, rows, images, tests)
    controls["ablation"] = splicing.ablations()

    def of_recipe(name: str, seed: int, active: float = K) -> SAE:
        sae = trained(name, source, seed, active)
        return leave_k(sae, held.rows) if name in ONE_THRESHOLD else sae

    def of_target(name: str, active: float) -> tuple[SAE, float]:
        sae = of_recipe(name, SEEDS[0], active)
        return sae, measure_sae(sae, held).l0

    def of_parts(n: float) -> tuple[SAE, float]:
        sae = nmf(seen["rows"], n)
        return sae, measure_sae(sae, held).l0

    def measured(name: str, made: Callable[[int], SAE], units: Units | None = None, first: SAE | None = None) -> None:
        first, second = first or made(SEEDS[0]), made(SEEDS[1])
        directions = [sae.W_dec.detach()[measure_sae(sae, held).density > 0] for sae in (first, second)]
        random = [torch.randn(d.shape, generator=torch.Generator().manual_seed(i)) for i, d in enumerate(directions)]
        codecs[name] = {
            **quality(first, held, fitted),
            **measure_units(units or latents(first, name), rows, concepts),
            **splicing.of(first),
            "stability": stability(*directions)._asdict(),
            "stability_random": stability(*random)._asdict(),
        }
        write_json(out, results)
        print(f"{name}: FVU {codecs[name]['fvu']:.4f}, L0 {codecs[name]['l0']:.2f}", flush=True)

    for name in RECIPES:
        if name in codecs:
            continue
        first, active = at_l0(partial(of_target, name)) if name in PENALISED else (None, None)
        measured(name, partial(of_recipe, name, active=active or K), first=first)
        codecs[name]["trained_to"] = active
    if "ITDA" not in codecs:
        measured("ITDA", partial(itda, seen["rows"]))
    if f"PCA-{K}" not in codecs:
        measured(f"PCA-{K}", partial(pca, seen["rows"]), components(seen["rows"], K))
    if "NMF" not in codecs:
        first, n_parts = at_l0(of_parts)
        measured("NMF", lambda seed: first, first=first)
        codecs["NMF"]["trained_to"] = round(n_parts)
        write_json(out, results)
    if "random pipeline" not in controls:
        topk = trained("TopK", source, SEEDS[0])
        for units in (neurons(seen["rows"]), latents(random_control(topk, fitted), "random SAE")):
            controls[units.name] = measure_units(units, rows, concepts)
        with random_weights(pipe, HOOKPOINT, 0):
            others = tests.rows(pipe, [HOOKPOINT])[1][HOOKPOINT]
        control = trained_control(topk, others, ~unseen)
        controls["random pipeline"] = {
            **quality(control, *parts(others, ~unseen)),
            **measure_units(latents(control, "random pipeline"), others, concepts),
        }
        write_json(out, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "codecs.json")
    parser.add_argument("--work", type=Path, default=Path("build/codecs"))
    arguments = parser.parse_args()
    run(arguments.out, arguments.work)


if __name__ == "__main__":
    main()
