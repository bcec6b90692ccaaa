"""Erasers under the adversary: learned words, and paraphrases.

    inverted UA     UA where the learned words stand in the place of the target's
    adversarial UA  share of noises with which none of the plain prompt, its paraphrases and the learned words bring it back

An eraser that leaves most images as they are is given no learned words: plain prompts and paraphrases say enough.

The learned words are learned from pictures of other noise. Against the negative prompt they have to bring back
`STRONG_ENOUGH` of the images, or the adversary is too weak to count, and its rows say so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.adversary import (
    N_VECTORS,
    Trajectory,
    first_vectors,
    free_words,
    invert,
    trajectory,
)
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.budget import ATTACK_STEPS
from sparsefeat.evaluation.card.edit import Edit, LearnedWords
from sparsefeat.evaluation.card.erasing import Erasing, path_of, right
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.emoji import OBJECT, Target, tasks_for
from sparsefeat.evaluation.generation import STATISTICS, TEST, Task, task
from sparsefeat.evaluation.intervals import interval, share_draws

STRONG_ENOUGH = 0.8
CALIBRATION = "negative prompt"
N_LEARNED_FROM = 8
WORTH_ATTACKING = 0.5
NOT_TRIED = "erasers that leave more than half of the target's images are given no learned words: their adversarial UA is a bound from above"

Verdict = tuple[Tensor | None, Tensor]
"""bool [n] each: with the learned words the target is gone (None: they were not tried), and with everything it is."""


def attacked_rows(bench: Bench, erasings: Sequence[Erasing]) -> list[Row]:
    """Of every eraser on the budget's attacked targets, the negative prompt first; the unedited pipeline erases nothing."""
    words = free_words(bench.pipe, emojicanvas.training_prompts())
    results: dict[str, list[Verdict]] = {}
    order = sorted(
        (one for one in erasings if one.eraser.name != "unedited"), key=lambda one: one.eraser.name != CALIBRATION
    )
    for target in bench.budget.attacked:
        aim, worded = _aim(bench, target, words)
        for erasing in order:
            name = erasing.eraser.name
            results.setdefault(name, []).append(_under(bench, erasing, target, aim, worded, words))
    note = _reservation(bench, results.get(CALIBRATION, []))
    rows = []
    seed = tasks_for(bench.budget.attacked[0], TEST, 1, 0)[0].seed
    for name, found in results.items():
        learned_against = [inverted for inverted, _ in found if inverted is not None]
        bound = "" if len(learned_against) == len(found) else NOT_TRIED
        for metric, parts in (("inverted UA", learned_against), ("adversarial UA", [both for _, both in found])):
            if parts:
                value = float(torch.stack([part.double().mean() for part in parts]).mean())
                ci = interval(torch.stack([share_draws(part, i) for i, part in enumerate(parts)]).mean(0))
                n, said = sum(map(len, parts)), "; ".join(filter(None, (bound, note)))
                rows.append(Row("erasers", name, OBJECT, metric, value, ci, n, seed, said))
    return rows


def _reservation(bench: Bench, calibrated: Sequence[Verdict]) -> str:
    """Why the adversary does not count; empty where it does."""
    if bench.budget.attack_steps < ATTACK_STEPS:
        return f"the adversary had {bench.budget.attack_steps} steps in the place of {ATTACK_STEPS}"
    if not calibrated:
        return f"the adversary was not tried against the {CALIBRATION}"
    back = float(torch.cat([~inverted for inverted, _ in calibrated if inverted is not None]).double().mean())
    if back < STRONG_ENOUGH:
        return f"the adversary is too weak to count: it brings back {back:.0%} against the {CALIBRATION}"
    return ""


def _aim(bench: Bench, target: Target, words: Sequence[str]) -> tuple[Trajectory, list[str]]:
    styles = len(emojicanvas.STYLES)
    learned = [task(target.index, i % styles, STATISTICS, i // styles) for i in range(N_LEARNED_FROM)]
    aim = trajectory(bench.pipe, [t.prompt for t in learned], [t.seed for t in learned], bench.call)
    return aim, [worded_with(t, words) for t in learned]


def worded_with(t: Task, words: Sequence[str]) -> str:
    """The task's prompt with other words for its object."""
    return f"a {emojicanvas.STYLES[t.style]} emoji of a {' '.join(words)}"


def _under(
    bench: Bench, erasing: Erasing, target: Target, aim: Trajectory, worded: Sequence[str], words: Sequence[str]
) -> Verdict:
    setting = erasing.chosen[target.kind]
    tasks = [t for t in tasks_for(target, TEST, bench.budget.n_target, 0) if target.shows(t)]

    def learned() -> Edit:
        edit = erasing.edit(target)
        start = first_vectors(bench.pipe, N_VECTORS, seed=target.index)
        steps = bench.budget.attack_steps
        vectors, _ = invert(bench.pipe, edit, aim, worded, words, start, steps=steps, call=bench.call)
        return replace(edit, words=LearnedWords(vectors, words))

    unit, _ = erasing.unit(target)
    plain = unit.gone & unit.paraphrased.reshape(-1, len(tasks)).all(0)
    if erasing.eraser.name != CALIBRATION and float(unit.gone.double().mean()) < WORTH_ATTACKING:
        return None, plain
    key = path_of(erasing.eraser, target, setting, f"inverted-{bench.budget.attack_steps}")
    said, _ = bench.verdicts(key, tasks, learned, worded=lambda t: worded_with(t, words))
    inverted = ~right(said, tasks)[0]
    return inverted, inverted & plain
