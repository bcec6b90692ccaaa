"""Judges × accuracy: on real drawings, whose object is known, the judge and the pipeline's own diffusion classifier."""

from __future__ import annotations

import torch

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.diffusion_classifier import diffusion_classifier
from sparsefeat.evaluation.intervals import interval, share_draws
from sparsefeat.evaluation.judge import judge_images
from sparsefeat.measure.machine import draw_precision

N_LEVELS = 4


def judges_rows(bench: Bench) -> list[Row]:
    """Which of all objects each of some drawings shows, its style given."""
    n_styles, n_objects = len(emojicanvas.STYLES), len(emojicanvas.OBJECTS)
    cells = [(i % n_styles, (13 * i + 4) % n_objects) for i in range(bench.budget.n_pictures)]
    styles, objects = zip(*cells, strict=True)
    drawings = torch.from_numpy(emojicanvas.load().on_white()[list(styles), list(objects)])
    images, truth = drawings.permute(0, 3, 1, 2).float() / 255, torch.tensor(objects)

    def likeliest() -> list[int]:
        found = []
        for image, style in zip(images, styles, strict=True):
            prompts = [emojicanvas.prompt(name, emojicanvas.STYLES[style]) for name in emojicanvas.OBJECTS]
            with draw_precision():  # as it draws
                errors = diffusion_classifier(bench.pipe, image[None], prompts, n_levels=N_LEVELS)
            found.append(int(errors.argmin()))
        return found

    said = {
        "judge": judge_images(bench.judge, images).objects,
        f"diffusion classifier, {N_LEVELS} levels": torch.tensor(bench.kept("judges/diffusion-classifier", likeliest)),
    }
    rows = []
    for name, named in said.items():
        right = named == truth
        value, ci = float(right.double().mean()), interval(share_draws(right, 0))
        rows.append(Row("judges", name, "real drawings, 50 objects", "accuracy", value, ci, len(right), 0))
    return rows
