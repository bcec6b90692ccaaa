"""Erasing by a concept's word, without an SAE: one way for each kind of thing that is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparsefeat.attribution import cad_erase
from sparsefeat.erasure.safe_latent_diffusion import safe_latent_diffusion
from sparsefeat.erasure.uce import UCE, TextEmbeddings
from sparsefeat.steering.saved import SavableInstrument

METHODS = ("cad", "uce", "sld")
PROMPTS = 4
"""Of the concept, that cad and uce look at."""


def erase_by_word(
    pipe: Any,
    concept: str,
    method: str = "uce",
    prompts: Mapping[str, Sequence[str]] | None = None,
    texts: TextEmbeddings | None = None,
    *,
    into: str | None = None,
    **call: Any,
) -> SavableInstrument:
    """The instrument that erases a concept by one of `METHODS`.

    Args:
        method: "uce", the weights that read the text, in closed form (`UCE`); "cad", the weights that make the concept
            (`cad_erase`); "sld", guidance away from it (`safe_latent_diffusion`), which needs no prompts and no fit.
        prompts: concept -> its prompts, of this concept and of those that are to stay; default the word alone.
        texts: what "uce" read of this pipeline for earlier concepts, and adds to.
        into: of "uce", a concept of `prompts` that takes the place, its prompts in the same order; default nothing does.
        call: arguments of the pipeline, for the runs of a fit.
    """
    if not concept.strip():
        raise ValueError("concept is empty; name what to erase, such as fox.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not known; use one of {', '.join(map(repr, METHODS))}.")
    if into is not None and (method != "uce" or into == concept or into not in (prompts or {})):
        raise ValueError(
            f"into={into!r} must be another concept of prompts, and is of method='uce'; leave it out or give one."
        )
    if method == "sld":
        return safe_latent_diffusion(concept, "max")
    own, others = texts_of(concept, prompts)
    if method == "cad":
        return cad_erase(pipe, own, **call)
    guide = "" if into is None or prompts is None else list(prompts[into][: len(own)])
    return UCE.fit(pipe, own, guide=guide, preserve=others, texts=texts or TextEmbeddings(pipe, **call))


def texts_of(concept: str, prompts: Mapping[str, Sequence[str]] | None) -> tuple[list[str], list[str]]:
    """What cad and uce look at: prompts of the concept, and for uce one of each that is to stay."""
    given = prompts or {}
    others = [text for name, texts in given.items() if name != concept for text in texts[:1]]
    return list(given.get(concept, [concept])[:PROMPTS]), others
