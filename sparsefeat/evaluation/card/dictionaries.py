"""Dictionaries × {FVU, probing, JS, IoU}: the embedded SAEs, beside what they must beat at the same hookpoint.

FVU      of the reconstruction, on images that nothing was fitted on; of PCA with as many components as latents are active
probing  area under the curve of the one unit that tells a prompt's word best, mean over words (sparse probing with k = 1)
JS       separability: Jensen-Shannon distance between concepts' activations, above what chance gives
IoU      GAN Dissection's (arXiv 1811.10597): a unit's map over its own threshold (its highest `TOP` of all places) against an
         object's mask, over all pictures; the best unit of each object, chosen on drawings of two styles and measured on
         those of the other two
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.evaluate_saes import Concepts, Drawing, measure_units, parts
from sparsefeat.evaluation.generation import TEST, held_out, whole_grid
from sparsefeat.evaluation.intervals import mean_interval
from sparsefeat.evaluation.sae_metrics import measure_sae, pca_fvu, random_control
from sparsefeat.evaluation.scenes import Picture, called, in_batches, real_drawings
from sparsefeat.evaluation.units import Units, components, latents, neurons
from sparsefeat.pipeline import Activations, Context, Hookpoint, Instrument, attach
from sparsefeat.pipeline.image_to_image import image_to_image
from sparsefeat.sae import SAE
from sparsefeat.training import Batch

TOP = 0.02
"""Of all places, those where a unit is on. GAN Dissection's is 0.005, of pictures of whole scenes: a drawing of one of fifty objects
fills a third of its picture, 0.7 % of all places."""
ROWS_PER_IMAGE = 16
HELD_OUT_SEED = 50_000


class Rows(Instrument):
    """Keeps what a hookpoint gives [batch, height, width, d_model], of a call of one step."""

    def __init__(self, at: str):
        self.at: Hookpoint = Hookpoint.parse(at)
        self.kept: list[Tensor] = []

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        assert context.grid is not None
        self.kept.append(activations.rows.float().clone().view(context.batch, *context.grid, -1))


def dissected(units: Units, rows: Tensor, masks: Tensor, of: Tensor) -> Tensor:
    """fp64 [objects], the IoU of each object's best unit.

    Args:
        rows: [pictures, height, width, d_model]. masks: bool [pictures, height, width], of each picture's one object.
        of: int64 [pictures, 2], the object and the half (0: chosen on, 1: measured on) of each.
    """
    n_objects = int(of[:, 0].max()) + 1
    flat = rows.flatten(0, 2)
    found = torch.cat([units.activations(part, None) for part in flat.split(4096)]).view(*rows.shape[:3], -1)
    choosing = of[:, 1] == 0
    on_places = found[choosing].flatten(0, 2)
    cut = on_places.kthvalue(max(1, round((1 - TOP) * len(on_places))), dim=0).values
    on = found > cut  # [pictures, height, width, units]
    ious = []
    for half in (choosing, ~choosing):
        each = torch.stack([half & (of[:, 0] == i) for i in range(n_objects)])
        both = torch.stack([(on[mine] & masks[mine][..., None]).sum((0, 1, 2)) for mine in each])
        own = torch.stack([masks[mine].sum() for mine in each])
        ious.append(both.double() / (own[:, None] + on[half].sum((0, 1, 2)) - both).clamp_min(1))
    return ious[1].gather(1, ious[0].argmax(1, keepdim=True))[:, 0]


def seen(bench: Bench, hookpoint: str) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, masks and what they are of, of all real drawings, noised a little and denoised in one pass."""
    pictures: Sequence[Picture] = real_drawings()
    rows = Rows(hookpoint)
    pipe = image_to_image(bench.pipe)[0]
    with attach(pipe, rows):
        masks = torch.cat([torch.cat(called(pipe, chunk)) for chunk in in_batches(pictures, 10)])
    kept = torch.cat(rows.kept)
    small = F.interpolate(masks[:, None].float(), size=kept.shape[1:3], mode="area")[:, 0] > 0.5
    styles = torch.arange(len(pictures)) // len(emojicanvas.OBJECTS)
    return kept, small, torch.stack([torch.tensor([p.objects[0] for p in pictures]), styles % 2], 1)


def dictionaries_rows(bench: Bench) -> list[Row]:
    """At the block's hookpoint and the last cross-attention's."""
    rows = []
    for sae in (bench.block_sae, bench.cross_saes[-1]):
        at = str(sae.config.hookpoint)
        found = bench.kept(f"dictionaries/{at.replace(':', '-')}", partial(_measured, bench, sae))
        for name, figures in found.items():
            for metric, (value, ci, n, note) in figures.items():
                given = None if ci is None else (ci[0], ci[1])
                rows.append(Row("dictionaries", name, at, metric, value, given, n, bench.budget.n_drawn, note))
    return rows


def _measured(bench: Bench, sae: SAE) -> dict[str, dict[str, Any]]:
    at = str(sae.config.hookpoint)
    prompts = emojicanvas.training_prompts()
    drawing = Drawing(prompts[: bench.budget.n_drawn], bench.budget.n_drawn, ROWS_PER_IMAGE, bench.call)
    concepts = Concepts.of_prompts(drawing.prompts)
    rows = drawing.rows(bench.pipe, [at])[1][at]
    _, fitted = parts(rows, concepts.choosing)
    unseen = Drawing([t.prompt for t in whole_grid(TEST) if held_out(t)], HELD_OUT_SEED, ROWS_PER_IMAGE, bench.call)
    unseen = unseen.first(max(2, bench.budget.n_drawn // 2))
    held = Batch(unseen.rows(bench.pipe, [at])[1][at].rows)
    quality = measure_sae(sae, held)
    k = min(sae.d_model, max(1, round(quality.l0)))
    control = random_control(sae, fitted)
    fvu = {
        "SAE": quality.fvu,
        "PCA": pca_fvu(held.rows, k, fit_rows=fitted.rows),
        "random SAE": measure_sae(control, held).fvu,
        "neurons": 0.0,
    }
    kinds = {
        "SAE": latents(sae, "SAE"),
        "PCA": components(fitted.rows, k),
        "random SAE": latents(control, "random SAE"),
        "neurons": neurons(fitted.rows),
    }
    kept, masks, of = seen(bench, at)
    found: dict[str, dict[str, Any]] = {}
    for name, units in kinds.items():
        told = measure_units(units, rows, concepts)
        ious = dissected(units, kept, masks, of)
        apart, around = told["separability"], told["separability_interval"]
        found[name] = {
            "FVU": (fvu[name], None, len(held.rows), "they are the rows" if name == "neurons" else ""),
            "probing": (told["probe_1"], None, len(drawing.prompts), ""),
            "JS": (apart, (apart - around, apart + around), len(drawing.prompts), ""),
            "IoU": (float(ious.mean()), mean_interval(ious), len(ious), ""),
        }
    return found
