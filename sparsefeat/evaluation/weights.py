"""What setting weights to 0 does to pictures: CAD-Erase and CAD-Amplify of one object, by the judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sparsefeat.assets import GUIDANCE, emojicanvas
from sparsefeat.attribution import cad_amplify, cad_erase
from sparsefeat.evaluation.emoji import OBJECT, Target, tasks_for
from sparsefeat.evaluation.generation import TEST, Task, generate
from sparsefeat.evaluation.judge import Judge, as_tensor
from sparsefeat.pipeline import attach


@dataclass(frozen=True)
class Effect:
    """prompts: those of `own`. own, others: the share of pictures in which the judge sees the target (own), or the object that was
    asked for (others, of prompts without the target); log_own, log_others: the mean logarithm of the probability that it gives it.
    """

    name: str
    prompts: str
    own: float
    log_own: float
    others: float
    log_others: float


@torch.no_grad()
def _seen(pipe: Any, judge: Judge, target: Target, n: int, n_steps: int, named: bool, name: str, mask: Any) -> Effect:
    tasks = tasks_for(target, TEST, n, n)

    def worded(t: Task) -> str:
        return t.prompt if named or not target.shows(t) else emojicanvas.prompt(None, emojicanvas.STYLES[t.style])

    during = None if mask is None else lambda _: attach(pipe, mask)
    images = generate(pipe, tasks, n_steps=n_steps, guidance=GUIDANCE, worded=worded, during=during)
    told = judge(as_tensor(images))[0].log_softmax(1)
    wanted = torch.tensor([task.object for task in tasks])
    right = (told.argmax(1) == wanted).float()
    logs = told.gather(1, wanted[:, None])[:, 0]
    means = [float(part.mean()) for part in (right[:n], logs[:n], right[n:], logs[n:])]
    return Effect(name, "that name it" if named else "of a style alone", *means)


def effects_of_weights(pipe: Any, judge: Judge, name: str, *, images: int = 8, n_steps: int = 10) -> Iterator[Effect]:
    """Pictures as they are and with the weights erased, of prompts that name the object; and as they are and with the weights
    amplified, of prompts that leave it open. On noise that no default was chosen on.

    Raises:
        ValueError: an object that EmojiCanvas has not.
    """
    if name not in emojicanvas.OBJECTS:
        raise ValueError(f"{name!r} is no object of EmojiCanvas; use one of {', '.join(emojicanvas.OBJECTS)}.")
    target = Target(OBJECT, emojicanvas.OBJECTS.index(name))
    prompts = [emojicanvas.prompt(name, style) for style in emojicanvas.STYLES]
    call: dict[str, Any] = {"num_inference_steps": n_steps, "guidance_scale": GUIDANCE}
    for named, edit, fit in ((True, "CAD-Erase", cad_erase), (False, "CAD-Amplify", cad_amplify)):
        yield _seen(pipe, judge, target, images, n_steps, named, "untouched", None)
        yield _seen(pipe, judge, target, images, n_steps, named, edit, fit(pipe, prompts, **call))
