"""The demo's steering: latents turned up towards styles and objects, and strips of the two that did it best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsefeat.assets import emojicanvas
from sparsefeat.demo.made import SHOWN, Demo, Grid, at, call_of, said
from sparsefeat.evaluation.emoji import OBJECT, STYLE
from sparsefeat.evaluation.generation import Task
from sparsefeat.evaluation.judge import Verdicts, judge_images
from sparsefeat.evaluation.run_emoji import TEXT_ENCODER, place_of
from sparsefeat.features import Found, search
from sparsefeat.features.chance import LEVEL
from sparsefeat.pipeline import attach
from sparsefeat.steering import Steer

TIMES = (-6.0, -3.0, -1.5, 0.0, 1.5, 3.0, 6.0)  # of the latent's mean activation where it is active
# What a latent is turned up towards: every style and every shown object, each in a drawing of another object in another style.
TRIED = [(STYLE, name) for name in emojicanvas.STYLES] + [(OBJECT, name) for name in SHOWN]
SHOWN_KINDS = (STYLE, OBJECT)
N_STEERED = 2 * len(TRIED) + len(SHOWN_KINDS) * (len(TIMES) - 2)
"""Images: unedited and turned up, and of the two shown all other strengths."""


def steering_sae(demo: Demo) -> int:
    """The text encoder's: what a latent there adds to a prompt, every layer draws."""
    return next(i for i, sae in enumerate(demo.saes) if place_of(sae) == TEXT_ENCODER)


@dataclass
class Tried:
    """A concept that a latent was turned up towards, in a drawing of something else."""

    kind: str
    concept: str
    found: Found
    usual: float
    subject: Task
    unedited: Tensor
    turned_up: Tensor
    shares: tuple[float, float]
    """How sure the judge is of the concept, in the unedited image and in the other."""
    verdict: str
    """What it takes the other for."""
    became: bool


def became(verdicts: Verdicts, i: int, kind: str, concept: str, subject: Task) -> bool:
    """Whether the judge sees the concept in image i, and otherwise what the prompt asked for."""
    seen = {OBJECT: emojicanvas.OBJECTS[int(verdicts.objects[i])], STYLE: emojicanvas.STYLES[int(verdicts.styles[i])]}
    asked = {OBJECT: emojicanvas.OBJECTS[subject.object], STYLE: emojicanvas.STYLES[subject.style]}
    return seen == asked | {kind: concept}


def try_steering(demo: Demo, surveyed: Grid) -> list[Tried]:
    """For every concept of `TRIED` its most specific latent, turned up as far as any is."""
    at_text, tried = steering_sae(demo), []
    styles = emojicanvas.STYLES
    subjects = [
        at(SHOWN[(i + 3) % len(SHOWN)], styles[(i + 1) % len(styles)])  # another object, another style
        for i in range(len(TRIED))
    ]
    unedited = demo.draw(subjects)
    for (kind, concept), subject, before in zip(TRIED, subjects, unedited, strict=True):
        statistics = surveyed.statistics[at_text, kind]
        found = search(statistics, concept, 1, examples=surveyed.examples[at_text])[0]
        usual = float(statistics.mean_active(concept)[found.latent])
        with attach(demo.pipe, Steer(demo.saes[at_text], add={found.latent: TIMES[-1] * usual})):
            after = demo.draw([subject])[0]
        verdicts = judge_images(demo.judge, torch.stack([before, after]))
        sure = demo.sure_of(kind, concept, verdicts)
        tried.append(
            Tried(
                kind, concept, found, usual, subject, before, after, (float(sure[0]), float(sure[1])),
                said(verdicts, 1), became(verdicts, 1, kind, concept, subject),
            )
        )  # fmt: skip
    return tried


def show_steering(demo: Demo, surveyed: Grid) -> None:
    """Two strips, of a style and of an object: of those tried, what the judge came to see most that it had not seen. A latent
    that chance explains is shown only if chance explains all, and one that took the rest of the prompt along only if all did."""
    demo.results["steering"] = []
    at_text, tried = steering_sae(demo), try_steering(demo, surveyed)
    for kind in SHOWN_KINDS:
        of_kind = [one for one in tried if one.kind == kind]
        best = max(
            of_kind,
            key=lambda one: (
                one.found.p is not None and one.found.p <= LEVEL,
                one.became,
                one.shares[1] - one.shares[0],
            ),
        )
        concept, latent, usual = best.concept, best.found.latent, best.usual
        drawn = {0.0: best.unedited, TIMES[-1]: best.turned_up}
        for times in TIMES:
            if times not in drawn:
                with attach(demo.pipe, Steer(demo.saes[at_text], add={latent: times * usual})):
                    drawn[times] = demo.draw([best.subject])[0]
        verdicts = judge_images(demo.judge, torch.stack([drawn[times] for times in TIMES]))
        strip = [
            {
                "times": times,
                "image": demo.picture(f"steer-{concept}-{times:+g}", drawn[times]),
                "judge_share": float(sure),
                "verdict": said(verdicts, i),
                "became": became(verdicts, i, kind, concept, best.subject),
            }
            for i, (times, sure) in enumerate(zip(TIMES, demo.sure_of(kind, concept, verdicts), strict=True))
        ]
        demo.results["steering"].append(
            {
                "hookpoint": demo.saes[at_text].config.hookpoint,
                "latent": latent,
                "kind": kind,
                "concept": emojicanvas.words(concept),
                "auc": best.found.auc,
                "p": best.found.p,
                "n_latents": demo.saes[at_text].n_latents,
                "usual": usual,
                "prompt": best.subject.prompt,
                "strip": strip,
                "tried": [
                    {
                        "concept": emojicanvas.words(one.concept),
                        "prompt": one.subject.prompt,
                        "share_before": one.shares[0],
                        "share_after": one.shares[1],
                        "verdict": one.verdict,
                        "p": one.found.p,
                    }
                    for one in of_kind
                ],
                "curves": {"peaks": surveyed.examples[at_text].peaks(latent).tolist()},
                "code": f"""\
import sparsefeat as sf
import torch
from sparsefeat.assets import load_pipeline, text_encoder_sae_folder

pipe, sae = load_pipeline(), sf.load_sae(text_encoder_sae_folder())
with sf.attach(pipe, sf.Steer(sae, add={{{latent}: {TIMES[-1] * usual:.4g}}})):
    image = {call_of(best.subject)}.images[0]
image.save("steered.png")""",
            }
        )
