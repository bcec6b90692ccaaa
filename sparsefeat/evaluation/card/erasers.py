"""The erasers of the card: a name, what makes the edit, and the settings among which validation noise chooses.

A new one is one more `Eraser`: see docs/instruments.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sparsefeat.assets import emojicanvas
from sparsefeat.attribution import attribute_weights
from sparsefeat.erasure import (
    ESD,
    UCE,
    ConceptLancet,
    Erase,
    Exchange,
    InterpretThenDeactivate,
    PosteriorAttenuation,
    ReplaceWhere,
    clamp_latents,
    guard_concept,
    random_latents,
    safe_latent_diffusion,
)
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.emoji import OBJECT, Target
from sparsefeat.evaluation.generation import STATISTICS, whole_grid
from sparsefeat.features import Statistics
from sparsefeat.features.scores import normalized_mean_difference
from sparsefeat.measure.machine import draw_precision
from sparsefeat.sae import SAE
from sparsefeat.steering import PromptVector

GUARD_STEPS = 3
"""Of the runs in which a guard's limit is found: what a prompt says is at its clearest in the first steps, and changes little."""

OBJECTS, STYLES = emojicanvas.OBJECTS, emojicanvas.STYLES


@dataclass(frozen=True)
class Eraser:
    """name: of its rows. make(bench, target, **setting): the edit that erases the target. settings: what is tried on
    validation noise. baseline: whether it is one that others are compared with. like: the name of the eraser whose chosen
    setting it takes, in the place of a choice of its own. behind: the name of the eraser that it is with what it has in the denoiser
    left out; from the words that get round that one, the adversary begins its second try.
    """

    name: str
    make: Callable[..., Edit]
    settings: tuple[Mapping[str, Any], ...] = ({},)
    baseline: bool = False
    like: str | None = None
    behind: str = "unedited"


def prompts_with(target: Target) -> list[str]:
    """Prompts that show the target: an object in every style, or every tenth object in a style."""
    if target.kind == OBJECT:
        return [emojicanvas.prompt(target.name, style) for style in STYLES]
    return [emojicanvas.prompt(name, target.name) for name in OBJECTS[::10]]


def prompts_by_concept(target: Target) -> dict[str, list[str]]:
    """The target's kind, each concept with prompts that show it."""
    names = OBJECTS if target.kind == OBJECT else STYLES
    return {name: prompts_with(Target(target.kind, i)) for i, name in enumerate(names)}


def prompts_without(target: Target) -> list[str]:
    """Prompts of all others of its kind."""
    return [p for name, prompts in prompts_by_concept(target).items() if name != target.name for p in prompts]


def bare(target: Target) -> str:
    """A prompt of the target alone: `an emoji of a fox`, `a mono emoji`."""
    return emojicanvas.prompt(target.name) if target.kind == OBJECT else emojicanvas.prompt(None, target.name)


def _nothing(bench: Bench, target: Target) -> Edit:
    return Edit()


def _negative_prompt(bench: Bench, target: Target) -> Edit:
    return Edit(negative_prompt=target.words)


def _sld(bench: Bench, target: Target, setting: str, warmup: int) -> Edit:
    return Edit((safe_latent_diffusion(target.words, setting, warmup=warmup),))


def _uce(bench: Bench, target: Target, of: str, preserve: bool, tokens: str = "onward") -> Edit:
    others = OBJECTS if target.kind == OBJECT else STYLES
    kept = [emojicanvas.words(name) for name in others if name != target.name] if preserve else []
    if of == "stand-in":
        other = Target(target.kind, bench.nearest(target)[0])
        return Edit((UCE.fit(bench.pipe, bare(target), guide=bare(other), preserve=kept, tokens=tokens),))
    if of == "word":
        return Edit((UCE.fit(bench.pipe, target.words, guide="", preserve=kept, tokens=tokens),))
    return Edit((UCE.fit(bench.pipe, bare(target), guide="an emoji", preserve=kept, tokens=tokens),))


def _esd(bench: Bench, target: Target, lr: float, iterations: int) -> Edit:
    return Edit((ESD.fit(bench.pipe, bare(target), lr=lr, iterations=iterations, **bench.call),))


def _cad(bench: Bench, target: Target, ratio: float, modules: str) -> Edit:
    prompts = prompts_with(target)
    scores = bench.once(
        ("CAD", target, modules), lambda: attribute_weights(bench.pipe, prompts, modules=modules, **bench.call)
    )
    return Edit((scores.mask(ratio, concept=target.words),))


def _saeuron(bench: Bench, target: Target, place: str, n_latents: int, gamma: float) -> Edit:
    how: dict[str, Any] = {"n_latents": n_latents, "gamma": gamma, "magnitude": "scale"}
    return Edit(tuple(Erase.from_statistics(sae, one, target.name, **how) for sae, one in _at(bench, target, place)))


def _random(bench: Bench, target: Target, place: str, **setting: Any) -> Edit:
    erases = _saeuron(bench, target, place, **setting).instruments
    found = [one for _, one in _at(bench, target, place)]
    drawn = [
        random_latents(erase, seed=target.index, statistics=one)
        for erase, one in zip(erases, found, strict=True)
        if isinstance(erase, Erase)
    ]
    return Edit(tuple(drawn))


def _at(bench: Bench, target: Target, place: str) -> list[tuple[SAE, Statistics]]:
    if place == "text":
        return [(bench.text_sae, bench.text_statistics(target.kind))]
    return list(zip(bench.cross_saes, bench.cross_statistics(target.kind), strict=True))


def _exchange(bench: Bench, target: Target, n_latents: int) -> Edit:
    prompts = emojicanvas.prompts_by_concept(target.words)
    return Edit((Exchange.fit(bench.pipe, bench.text_sae, target.words, prompts, n_latents=n_latents),))


def _exchange_and_clamp(bench: Bench, target: Target, factor: float) -> Edit:
    """What words still bring to the cross-attentions is held down there."""
    both = _exchange(bench, target, 32).instruments + _clamp(bench, target, "cross", 8, factor).instruments
    return Edit(both)


def _exchange_and_guard(bench: Bench, target: Target, **of_uce: Any) -> Edit:
    """What words still bring to the cross-attentions is noticed there; `of_uce`: what is left of them after UCE."""
    exchange = _exchange(bench, target, 32).instruments
    if of_uce:
        exchange += _uce(bench, target, **of_uce).instruments
    prompts: dict[str, list[str]] = {}
    for t in whole_grid(STATISTICS):
        prompts.setdefault(OBJECTS[t.object] if target.kind == OBJECT else STYLES[t.style], []).append(t.prompt)
    call = {**bench.call, "num_inference_steps": min(GUARD_STEPS, bench.n_steps), "batch_size": 50}
    with draw_precision():
        guards = guard_concept(bench.pipe, bench.cross_saes, target.name, prompts, behind=exchange, **call)
    return Edit((*exchange, guards))


def _itd(bench: Bench, target: Target, top_m: int, strength: float) -> Edit:
    fitted = InterpretThenDeactivate.fit(
        bench.pipe,
        bench.text_sae,
        prompts_with(target),
        prompts_without(target),
        top_m=top_m,
        strength=strength,
    )
    return Edit((fitted,))


def _concept_steerers(bench: Bench, target: Target, strength: float) -> Edit:
    return Edit((PromptVector(bench.text_sae, bare(target), strength),))


def _app(bench: Bench, target: Target, n_latents: int) -> Edit:
    fitted = PosteriorAttenuation.fit(
        bench.pipe,
        bench.text_sae,
        target.name,
        prompts_by_concept(target),
        n_latents=n_latents,
        batch_size=50,
        num_inference_steps=1,  # the text encoder runs before the steps
        output_type="latent",
    )
    return Edit((fitted,))


def _clamp(bench: Bench, target: Target, place: str, n_latents: int, factor: float) -> Edit:
    how: dict[str, Any] = {"n_latents": n_latents, "factor": factor}
    return Edit(tuple(clamp_latents(sae, one, target.name, **how) for sae, one in _at(bench, target, place)))


def _replace_where(bench: Bench, target: Target, source: str, n_latents: int) -> Edit:
    instruments = []
    for sae, one in _at(bench, target, "cross"):
        scores = normalized_mean_difference(one.mean(target.name), one.mean(one.others(target.name)))
        chosen = scores.topk(n_latents).indices.tolist()
        instruments.append(ReplaceWhere(sae, dict.fromkeys(chosen, 0.0), source=source))
    return Edit(tuple(instruments))


def _lancet(bench: Bench, target: Target, layer: int, strength: float) -> Edit:
    fitted = ConceptLancet.fit(
        bench.pipe,
        f"text_encoder.encoder.layers.{layer}",
        prompts_by_concept(target),
        target.name,
        strength=strength,
    )
    return Edit((fitted,))


ERASERS: tuple[Eraser, ...] = (
    Eraser("unedited", _nothing, baseline=True),
    Eraser("negative prompt", _negative_prompt, baseline=True),
    Eraser(
        "SLD",
        _sld,
        (
            {"setting": "max", "warmup": 0},
            {"setting": "medium", "warmup": 0},
            {"setting": "strong", "warmup": 0},
            {"setting": "strong", "warmup": 3},
        ),
        baseline=True,
    ),
    Eraser(
        "UCE",
        _uce,
        (
            {"of": "bare", "preserve": False},
            {"of": "stand-in", "preserve": False},
            {"of": "word", "preserve": False},
            {"of": "word", "preserve": True},
            {"of": "bare", "preserve": True},
        ),
        baseline=True,
    ),
    Eraser("UCE, last token", partial(_uce, tokens="last"), baseline=True, like="UCE"),
    Eraser(
        "ESD",
        _esd,
        ({"lr": 3e-3, "iterations": 100}, {"lr": 1e-3, "iterations": 100}, {"lr": 1e-3, "iterations": 400}),
        baseline=True,
    ),
    Eraser(
        "CAD-Erase",
        _cad,
        (
            {"ratio": 0.03, "modules": "attn2"},
            {"ratio": 0.06, "modules": "attn2"},
            {"ratio": 0.01, "modules": "attn2"},
            {"ratio": 0.01, "modules": "ff"},
        ),
    ),
    Eraser("exchange", _exchange, ({"n_latents": 32}, {"n_latents": 64}, {"n_latents": 16})),
    Eraser("exchange and clamp", _exchange_and_clamp, ({"factor": 0.0}, {"factor": 1.0}), behind="exchange"),
    Eraser("exchange and guard", _exchange_and_guard, behind="exchange"),
    Eraser("exchange, UCE and guard", _exchange_and_guard, like="UCE", behind="exchange"),
    Eraser(
        "SAeUron",
        _saeuron,
        (
            {"place": "text", "n_latents": 24, "gamma": -0.5},
            {"place": "cross", "n_latents": 8, "gamma": -2.0},
            {"place": "text", "n_latents": 16, "gamma": -0.5},
            {"place": "text", "n_latents": 32, "gamma": -0.5},
        ),
    ),
    Eraser("as many random latents", _random, baseline=True, like="SAeUron"),
    Eraser(
        "ItD",
        _itd,
        (
            {"top_m": 16, "strength": -2.0},
            {"top_m": 48, "strength": -2.0},
            {"top_m": 48, "strength": -8.0},
            {"top_m": 16, "strength": -8.0},
        ),
    ),
    Eraser(
        "Concept Steerers",
        _concept_steerers,
        ({"strength": -0.25}, {"strength": -0.125}, {"strength": -0.5}, {"strength": -0.06}),
    ),
    Eraser("APP", _app, ({"n_latents": 32}, {"n_latents": 128}, {"n_latents": 8})),
    Eraser(
        "clamp",
        _clamp,
        (
            {"place": "text", "n_latents": 24, "factor": 0.0},
            {"place": "cross", "n_latents": 8, "factor": 0.0},
            {"place": "text", "n_latents": 32, "factor": 1.0},
            {"place": "cross", "n_latents": 32, "factor": 0.0},
        ),
    ),
    Eraser(
        "replace where",
        _replace_where,
        (
            {"source": "uncond", "n_latents": 8},
            {"source": "patch", "n_latents": 8},
            {"source": "uncond", "n_latents": 32},
            {"source": "uncond", "n_latents": 2},
        ),
    ),
    Eraser(
        "concept lancet",
        _lancet,
        (
            {"layer": 0, "strength": 1.0},
            {"layer": 0, "strength": 2.0},
            {"layer": 1, "strength": 2.0},
            {"layer": 1, "strength": 1.0},
        ),
    ),
)
