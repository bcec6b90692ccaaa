"""Erasers under the adversary: learned words, and paraphrases.

    inverted UA     UA where the learned words stand in the place of the target's
    adversarial UA  share of noises with which none of the plain prompt, its paraphrases and the learned words bring it back

An eraser that leaves most images as they are is given no learned words, nor one that the budget spares: plain prompts and
paraphrases alone say what its adversarial UA is at most.

Words are learned twice: from random vectors, and from words that bring the concept back where the eraser, or what it has in the denoiser,
is not there (`Eraser.behind`): they meet a switch from the side on which it is on. An image is without the concept if neither brings it back.

The learned words are learned from pictures of other noise. Against the negative prompt they have to bring back
`STRONG_ENOUGH` of the images, or the adversary is too weak to count, and its rows say so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.evaluation.card.adversary import N_VECTORS, first_vectors, free_words, invert, trajectory
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.budget import ATTACK_STEPS
from sparsefeat.evaluation.card.edit import Edit, LearnedWords
from sparsefeat.evaluation.card.erasers import Eraser
from sparsefeat.evaluation.card.erasing import Erasing, paraphrase, path_of, right
from sparsefeat.evaluation.card.forked import at_once
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.emoji import OBJECT, Target, tasks_for
from sparsefeat.evaluation.generation import STATISTICS, TEST, Task, task
from sparsefeat.evaluation.intervals import interval, share_draws

STRONG_ENOUGH = 0.8
CALIBRATION = "negative prompt"
N_LEARNED_FROM = 8
WORTH_ATTACKING = 0.5


class Verdict(NamedTuple):
    """bool [n] each: with the learned words the target is gone (None: none were learned), and with everything it is."""

    inverted: Tensor | None
    both: Tensor


def attacked_rows(bench: Bench, erasings: Sequence[Erasing]) -> list[Row]:
    """Of every eraser on the budget's attacked targets, the negative prompt first; the unedited pipeline erases nothing."""
    words = free_words(bench.pipe, emojicanvas.training_prompts())
    results: dict[str, list[Verdict]] = {}
    order = sorted(
        (one for one in erasings if one.eraser.name != "unedited"), key=lambda one: one.eraser.name != CALIBRATION
    )
    plain = Erasing(bench, Eraser("unedited", lambda bench, target: Edit()), {})
    for target in bench.budget.attacked:
        learned = learned_words(bench, [one for one in order if _worth(bench, one, target)], plain, target, words)
        for one in order:
            name = one.eraser.name
            results.setdefault(name, []).append(_under(bench, one, target, learned.get(name, ())))
    note = _reservation(bench, results.get(CALIBRATION, []))
    rows = []
    seed = tasks_for(bench.budget.attacked[0], TEST, 1, 0)[0].seed
    for name, found in results.items():
        learned_against = [one.inverted for one in found if one.inverted is not None]
        bound = len(learned_against) < len(found)
        for metric, parts in (("inverted UA", learned_against), ("adversarial UA", [one.both for one in found])):
            if parts:
                value = float(torch.stack([part.double().mean() for part in parts]).mean())
                ci = interval(torch.stack([share_draws(part, i) for i, part in enumerate(parts)]).mean(0))
                n = sum(map(len, parts))
                rows.append(Row("erasers", name, OBJECT, metric, value, ci, n, seed, note, bound))
    return rows


def _worth(bench: Bench, erasing: Erasing, target: Target) -> bool:
    """Whether words are learned against it."""
    name = erasing.eraser.name
    if name == CALIBRATION:
        return True
    return name not in bench.budget.spared and float(_plain(erasing, target)[0].double().mean()) >= WORTH_ATTACKING


def _plain(erasing: Erasing, target: Target) -> tuple[Tensor, Tensor]:
    """bool [n] each: with the plain prompt the target is gone, and with its paraphrases too."""
    unit, _ = erasing.unit(target)
    return unit.gone, unit.gone & unit.paraphrased.reshape(-1, len(unit.gone)).all(0)


def _reservation(bench: Bench, calibrated: Sequence[Verdict]) -> str:
    """Why the adversary does not count; empty where it does."""
    if bench.budget.attack_steps < ATTACK_STEPS:
        return f"the adversary had {bench.budget.attack_steps} steps in the place of {ATTACK_STEPS}"
    if not calibrated:
        return f"the adversary was not tried against the {CALIBRATION}"
    back = float(torch.cat([~one.inverted for one in calibrated if one.inverted is not None]).double().mean())
    if back < STRONG_ENOUGH:
        return f"the adversary is too weak to count: it brings back {back:.0%} against the {CALIBRATION}"
    return ""


def worded_with(t: Task, words: Sequence[str]) -> str:
    """The task's prompt with other words for its object."""
    return f"a {emojicanvas.STYLES[t.style]} emoji of a {' '.join(words)}"


def learned_words(
    bench: Bench, erasings: Sequence[Erasing], plain: Erasing, target: Target, words: Sequence[str]
) -> dict[str, tuple[LearnedWords, ...]]:
    """The words that were learned against each eraser, by its name: from random vectors, and from those of what it stands behind.

    plain: the pipeline as it is, that has the name of those which stand behind nothing.
    """
    if not erasings:
        return {}
    styles, steps = len(emojicanvas.STYLES), bench.budget.attack_steps
    shown = [task(target.index, i % styles, STATISTICS, i // styles) for i in range(N_LEARNED_FROM)]

    def learn(erasing: Erasing, start: Tensor) -> list[list[float]]:
        aim = bench.once(
            ("aim", target),
            lambda: trajectory(bench.pipe, [t.prompt for t in shown], [t.seed for t in shown], bench.call),
        )
        worded = [worded_with(t, words) for t in shown]
        edit = erasing.edit(target)
        return invert(bench.pipe, edit, aim, worded, words, start, steps=steps, call=bench.call)[0].tolist()

    def tried(part: str, starts: Sequence[tuple[Erasing, Tensor]]) -> dict[str, Tensor]:
        keys = [path_of(one.eraser, target, one.chosen[target.kind], f"{part}-{steps}") for one, _ in starts]
        found = [partial(bench.kept, key, partial(learn, *start)) for key, start in zip(keys, starts, strict=True)]
        missing = [i for i, key in enumerate(keys) if not bench.has(key)]
        for i in missing:
            starts[i][0].edit(target)  # fitted here, where all threads are at work and what comes next has it too
        at_once([found[i] for i in missing])
        return {one.eraser.name: torch.tensor(vectors()) for (one, _), vectors in zip(starts, found, strict=True)}

    random = first_vectors(bench.pipe, N_VECTORS, seed=target.index)
    first = tried("words", [(one, random) for one in (plain, *erasings)])
    again = tried("words-again", [(one, first.get(one.eraser.behind, first[plain.eraser.name])) for one in erasings])
    return {name: tuple(LearnedWords(of[name], words) for of in (first, again)) for name in again}


def _under(bench: Bench, erasing: Erasing, target: Target, learned: Sequence[LearnedWords]) -> Verdict:
    plain = _plain(erasing, target)[1]
    if not learned:
        return Verdict(None, plain)

    def gone(part: str, tasks: Sequence[Task], edit: Callable[[], Edit], worded: Callable[[Task], str]) -> Tensor:
        key = path_of(erasing.eraser, target, erasing.chosen[target.kind], part)
        return ~right(bench.verdicts(key, tasks, edit, worded=worded)[0], tasks)[0]

    tasks = tasks_for(target, TEST, bench.budget.n_inverted, 0)
    more = tasks[len(plain) :]
    if more:
        own = partial(erasing.edit, target)
        parts = [gone("more", more, own, lambda t: t.prompt)]
        parts += [gone(f"more-{i}", more, own, partial(paraphrase, target, i)) for i in range(2)]
        plain = torch.cat([plain, torch.stack(parts).all(0)])

    def under(words: LearnedWords) -> Edit:
        return replace(erasing.edit(target), words=words)

    tries = []
    for part, words in zip(("inverted", "inverted-again"), learned, strict=True):
        worded = partial(worded_with, words=words.words)
        tries.append(gone(f"{part}-{bench.budget.attack_steps}", tasks, partial(under, words), worded))
    inverted = torch.stack(tries).all(0)
    return Verdict(inverted, inverted & plain)
