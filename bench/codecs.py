"""Codecs at equal sparsity on the embedded pipeline: `python -m bench.codecs` (resumable; half an hour on two quiet cores).

Every codec of the table has as many latents and as many of them active a row, sees the same rows in the same order for as
many steps at the same learning rate, and is trained twice, from two seeds. ITDA, PCA and NMF are fitted to the same rows.
Reconstruction is measured on prompts that none was trained on; the rest as in `sparsefeat.evaluation.evaluate_saes`.

Writes bench/results/codecs.json after every codec; `python tools/write_tables.py` makes the table of docs/training.md
from it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.run import RESULTS
from sparsefeat.assets import GUIDANCE, N_STEPS, load_pipeline
from sparsefeat.evaluation.emoji import write_json
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
from sparsefeat.evaluation.sae_metrics import measure_sae, random_control
from sparsefeat.evaluation.stability import stability
from sparsefeat.evaluation.units import Units, components, latents, neurons
from sparsefeat.measure.machine import device_name
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import CollectedRows, SAETrainer, TensorRows, build_itda, recipe

HOOKPOINT = "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2"
N_LATENTS, K, STEPS, BATCH, LR = 512, 8, 600, 1024, 2e-3
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


def trained(name: str, rows: TensorRows, seed: int) -> SAE:
    d_model = rows.d_model
    options: dict[str, Any] = {"hookpoint": HOOKPOINT}
    if name == "temporal-aware":
        options["time_width"] = d_model
    pieces: dict[str, Any] = {"dead_after": 100 * BATCH}
    if name == "ReLU":
        pieces["sparsity"] = 1e-2
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
        # Where a penalty's weight is found on the way, latents must still be able to move while it is.
        decay_steps=STEPS // 5 if name in PENALISED else STEPS - 50,
        grad_clip=1.0,
        seed=seed,
    )
    torch.manual_seed(seed)
    return SAETrainer(SAE(made.sae), rows, made.train).fit(progress=False)


def itda(rows: Tensor, seed: int) -> SAE:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return build_itda(rows[order].split(4096), N_LATENTS, K, hookpoint=HOOKPOINT)


def pca(rows: Tensor, seed: int) -> SAE:
    """The K directions of most variance as an SAE, all of whose latents are always active."""
    wide = rows.double()
    sae = SAE(SAEConfig(rows.shape[1], K, "raw_topk", k=K, hookpoint=HOOKPOINT)).eval()
    with torch.no_grad():
        directions = torch.linalg.eigh(torch.cov(wide.T)).eigenvectors[:, -K:].T
        for name, tensor in (
            ("W_enc", directions),
            ("W_dec", directions),
            ("b_pre", wide.mean(0)),
            ("b_out", wide.mean(0)),
        ):
            sae.get_parameter(name).copy_(tensor)
    return sae


class NMF:
    """Rows around their median, both signs of every dimension, as K non-negative parts (multiplicative updates of Lee and
    Seung for the squared error); `parts [K, 2 d_model]`."""

    def __init__(self, rows: Tensor, updates: int = 200) -> None:
        self.centre = rows.median(0).values
        data = self._signs(rows[:: max(1, len(rows) // 16_384)])
        generator = torch.Generator().manual_seed(0)
        codes = torch.rand(len(data), K, generator=generator)
        self.parts = torch.rand(K, data.shape[1], generator=generator)
        for _ in range(updates):
            codes = self._better(codes, data)
            self.parts *= (codes.T @ data) / (codes.T @ codes @ self.parts + 1e-9)

    def _signs(self, rows: Tensor) -> Tensor:
        around = rows - self.centre
        return torch.cat([around, -around], 1).relu()

    def _better(self, codes: Tensor, data: Tensor) -> Tensor:
        return codes * (data @ self.parts.T) / (codes @ (self.parts @ self.parts.T) + 1e-9)

    def codes(self, rows: Tensor, timestep: Tensor | None = None, updates: int = 100) -> Tensor:
        data = self._signs(rows)
        codes = torch.ones(len(rows), K)
        for _ in range(updates):
            codes = self._better(codes, data)
        return codes

    def measured(self, rows: Tensor) -> dict[str, float]:
        positive, negative = self.parts.chunk(2, 1)
        codes = self.codes(rows)
        found = (codes @ (positive - negative) + self.centre).double()
        x = rows.double()
        fvu = (x - found).square().sum() / (x - x.mean(0)).square().sum()
        return {
            "fvu": float(fvu),
            "cosine": float(torch.cosine_similarity(x, found, dim=1).mean()),
            "l0": float((codes > 1e-6).double().sum(1).mean()),
            "dead": 0.0,
        }


def run(out: Path, work: Path) -> None:
    pipe = load_pipeline()
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
    results |= {
        "device": device_name(),
        "date": date.today().isoformat(),
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

    def measured(name: str, made: Callable[[int], SAE], units: Units | None = None) -> None:
        if name in codecs:
            return
        started = time.perf_counter()
        first = made(SEEDS[0])
        seconds = time.perf_counter() - started
        second = made(SEEDS[1])
        directions = [sae.W_dec.detach()[measure_sae(sae, held).density > 0] for sae in (first, second)]
        random = [torch.randn(d.shape, generator=torch.Generator().manual_seed(i)) for i, d in enumerate(directions)]
        codecs[name] = {
            "training_seconds": seconds,
            **quality(first, held, fitted),
            **measure_units(units or latents(first, name), rows, concepts),
            **splicing.of(first),
            "stability": stability(*directions)._asdict(),
            "stability_random": stability(*random)._asdict(),
        }
        write_json(out, results)
        print(f"{name}: FVU {codecs[name]['fvu']:.4f}, L0 {codecs[name]['l0']:.2f}, {seconds:.0f} s", flush=True)

    for name in RECIPES:
        measured(name, partial(trained, name, source))
    measured("ITDA", partial(itda, seen["rows"]))
    measured(f"PCA-{K}", partial(pca, seen["rows"]), components(seen["rows"], K))
    if "NMF" not in codecs:
        nmf = NMF(seen["rows"])
        codecs["NMF"] = {**nmf.measured(held.rows), **measure_units(Units("NMF", K, nmf.codes), rows, concepts)}
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
