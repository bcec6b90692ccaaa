"""Steerers × {dose, specificity}: how a picture's style follows the strength, and what else changes.

Pictures of other styles are steered towards the style "mono", at doses from 1/4 to 1.4 times a strength of each method's own.
With p the judge's probability of the style and q that of the prompt's object:

    dose          Spearman's rank correlation of the dose with p, within each picture, the mean over pictures
    reached       the largest rise of p over the undosed picture, the mean over pictures, among the doses
    else per unit how much q falls, for each unit that p rises, at the least dose of at least half the largest rise; 0 is a specific
                  steerer

The largest rise has to be at least `LEAST` for a quotient to mean anything; below it there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.card.erasers import prompts_with
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.emoji import STYLE, Target
from sparsefeat.evaluation.generation import TEST, Task, task
from sparsefeat.evaluation.intervals import interval, mean_interval, resampled
from sparsefeat.evaluation.judge import as_tensor
from sparsefeat.features.scores import normalized_mean_difference
from sparsefeat.pipeline import attach
from sparsefeat.steering import (
    AddVector,
    Compose,
    LinearAcT,
    PromptVector,
    ScoreEdit,
    Slider,
    Steer,
    discover_direction,
)
from sparsefeat.training import CollectActivations

TOWARDS = Target(STYLE, emojicanvas.STYLES.index("mono"))
DOSES = (0.25, 0.5, 0.7, 1.0, 1.4)
LEAST = 0.1
LAYER = "text_encoder.encoder.layers.0"


@dataclass(frozen=True)
class Steerer:
    """name: of its rows. make(bench): dose -> the edit; what has to be fitted is fitted once."""

    name: str
    make: Callable[[Bench], Callable[[float], Edit]]


def _others() -> list[str]:
    return [emojicanvas.prompt(name, style) for name in emojicanvas.OBJECTS[::10] for style in emojicanvas.STYLES[:3]]


def _pairs() -> tuple[list[str], list[str]]:
    names = emojicanvas.OBJECTS[::5]
    source = [emojicanvas.prompt(name, emojicanvas.STYLES[i % 3]) for i, name in enumerate(names)]
    return source, [emojicanvas.prompt(name, TOWARDS.name) for name in names]


def _sae_latents(bench: Bench) -> Callable[[float], Edit]:
    found = bench.text_statistics(STYLE)
    others = found.others(TOWARDS.name)
    best = normalized_mean_difference(found.mean(TOWARDS.name), found.mean(others)).topk(8).indices
    usual = found.mean_active(TOWARDS.name)[best]
    amounts = dict(zip(best.tolist(), usual.tolist(), strict=True))
    return lambda dose: Edit((Steer(bench.text_sae, add={i: dose * a for i, a in amounts.items()}),))


def _prompt_vector(bench: Bench) -> Callable[[float], Edit]:
    concept = emojicanvas.prompt(None, TOWARDS.name)
    return lambda dose: Edit((PromptVector(bench.text_sae, concept, dose / 2),))


def _mean_rows(bench: Bench, prompts: Sequence[str]) -> Tensor:
    collect = CollectActivations(LAYER, dtype=torch.float32)
    with attach(bench.pipe, collect):
        bench.pipe(list(prompts), num_inference_steps=1, guidance_scale=1.0, output_type="latent")
    return collect.collected(LAYER).rows.mean(0)


def _difference(bench: Bench) -> Callable[[float], Edit]:
    vector = _mean_rows(bench, prompts_with(TOWARDS)) - _mean_rows(bench, _others())
    return lambda dose: Edit((AddVector(LAYER, 2 * dose * vector),))


def _random(bench: Bench) -> Callable[[float], Edit]:
    vector = _mean_rows(bench, prompts_with(TOWARDS)) - _mean_rows(bench, _others())
    drawn = torch.randn(vector.shape, generator=torch.Generator().manual_seed(0))
    return lambda dose: Edit((AddVector(LAYER, 2 * dose * vector.norm() * drawn / drawn.norm()),))


def _act(bench: Bench) -> Callable[[float], Edit]:
    source, target = _pairs()
    places = [LAYER, "text_encoder.encoder.layers.1"]
    short: dict[str, Any] = {
        "num_inference_steps": 1,
        "output_type": "latent",
    }  # the text encoder runs before the steps
    fitted = LinearAcT.fit(bench.pipe, places, source, target, condition="cond", **short)
    maps: Any = fitted.maps
    strongest = max(DOSES)  # its strength ends at 1
    return lambda dose: Edit((LinearAcT(maps, strength=dose / strongest, condition="cond"),))


def _discovered(bench: Bench) -> Callable[[float], Edit]:
    _, target = _pairs()
    found = discover_direction(bench.pipe, "unet.mid_block", target, "an emoji", epochs=4, **bench.call)
    return lambda dose: Edit((AddVector("unet.mid_block", found.vectors, strength=4 * dose),))


def _slider(bench: Bench) -> Callable[[float], Edit]:
    ends = emojicanvas.prompt(None, TOWARDS.name), "an emoji"
    return lambda dose: Edit((ScoreEdit(Slider(*ends, scale=4 * dose), steps=(0.2, 1.0)),))


def _compose(bench: Bench) -> Callable[[float], Edit]:
    return lambda dose: Edit((ScoreEdit(Compose({emojicanvas.prompt(None, TOWARDS.name): 1.4 * dose})),))


STEERERS: tuple[Steerer, ...] = (
    Steerer("SAE latents, text encoder", _sae_latents),
    Steerer("Concept Steerers", _prompt_vector),
    Steerer("difference of means", _difference),
    Steerer("random direction", _random),
    Steerer("Linear-AcT", _act),
    Steerer("discovered h-space direction", _discovered),
    Steerer("Slider", _slider),
    Steerer("Composable", _compose),
)


def tasks(bench: Bench) -> list[Task]:
    """Objects in the other styles."""
    n = len(emojicanvas.OBJECTS)
    return [task((6 * i + 1) % n, i % TOWARDS.index, TEST, 30 + i // n) for i in range(bench.budget.n_steered)]


@torch.no_grad()
def probabilities(bench: Bench, images: Tensor, tasks: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """p of the style and q of each task's object, [n] each."""
    objects, styles = bench.judge(as_tensor(images))
    rows = torch.arange(len(tasks))
    return styles.softmax(1)[:, TOWARDS.index], objects.softmax(1)[rows, torch.tensor([t.object for t in tasks])]


def steerers_rows(bench: Bench, steerers: Sequence[Steerer] = STEERERS) -> list[Row]:
    """The rows of all steerers."""
    drawn = tasks(bench)

    def said(edit: Callable[[], Edit]) -> dict[str, list[float]]:
        p, q = probabilities(bench, bench.draw(drawn, edit()), drawn)
        return {"style": p.tolist(), "object": q.tolist()}

    plain = bench.kept("steerers/undosed", lambda: said(Edit))
    rows = []
    for steerer in steerers:
        made: list[Callable[[float], Edit]] = []

        def at(dose: float, steerer: Steerer = steerer, made: list = made) -> Edit:
            if not made:
                made.append(steerer.make(bench))
            return made[0](dose)

        name = steerer.name.replace(" ", "-").replace(",", "")
        found = [bench.kept(f"steerers/{name}/{dose}", partial(said, partial(at, dose))) for dose in DOSES]
        p, q = (torch.tensor([plain[of], *(one[of] for one in found)]).double() for of in ("style", "object"))
        rows += figures(steerer.name, p, q, drawn[0].seed)
    return rows


def figures(name: str, p: Tensor, q: Tensor, seed: int) -> list[Row]:
    """p, q: [1 + doses, images], the first without a dose."""
    n = p.shape[1]
    ranks = torch.tensor([_rank(p[:, i]) for i in range(n)])
    rise, fall = p[1:] - p[0], q[0] - q[1:]
    best = int(rise.mean(1).argmax())
    reached = float(rise[best].mean())
    enough = int((rise.mean(1) >= reached / 2).int().argmax())
    both = torch.stack([rise[enough], fall[enough]], 1)
    specific, ci = None, None
    if reached >= LEAST:
        specific = float(both[:, 1].mean() / both[:, 0].mean())
        ci = interval(resampled(both, lambda some: float(some[:, 1].mean() / some[:, 0].mean().clamp_min(1e-3))))
    values = (
        ("dose", float(ranks.mean()), mean_interval(ranks)),
        ("reached", reached, mean_interval(rise[best])),
        ("else per unit", specific, ci),
    )
    note = "" if specific is not None else f"the style's probability rises by less than {LEAST}"
    return [Row("steerers", name, "style mono", metric, value, ci, n, seed, note) for metric, value, ci in values]


def _rank(p: Tensor) -> float:
    """0 where p does not change at all."""
    found = float(stats.spearmanr([0.0, *DOSES], p.tolist()).statistic) if p.unique().numel() > 1 else 0.0
    return found if found == found else 0.0
