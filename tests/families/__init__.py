"""Tiny, randomly initialised pipelines, one model family a file, made of diffusers' own classes: nothing is downloaded.

Each file defines `FAMILY`, a `TinyFamily`: how to build the pipeline, how to call it, and what is known beforehand
about its blocks and its guidance. Tests over all families take them from `families()`. diffusers' classes are
imported inside `build`, so a file can be read by a diffusers that lacks the family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers


@dataclass(frozen=True)
class Block:
    """One hookpoint of a tiny pipeline and what has to be found there."""

    path: str
    stream: str
    """Of the hookpoint: "image" or "text"."""
    width: int
    square: tuple[int, ...] | None = None
    """The grid of its positions when called with `size="square"`; None for text."""
    wide: tuple[int, ...] | None = None
    """The same for `size="wide"`, whose two sides differ (wider than high)."""

    def grid(self, size: str) -> tuple[int, ...] | None:
        return self.square if size == "square" else self.wide


@dataclass(frozen=True)
class TinyFamily:
    name: str
    """As the file is called: "flux"."""
    title: str
    """As people call it: "FLUX.1"."""
    pipeline: str
    """The pipeline's class in diffusers."""
    build: Callable[..., Any]
    """`build(**options)` makes the pipeline, progress bar off; the same weights every time."""
    call: Callable[..., Any]
    """`call(pipe, prompts, *, guidance, images_per_prompt=1, size="square", steps=2, seed=0, **arguments)`.

    `prompts` is a list of texts, `guidance` whether classifier-free guidance is on (a family with `guidance` other
    than "cfg" takes it and does nothing with it), `size` "square" or "wide", `arguments` go to the pipeline. Returns
    the final latents (or the images as an array where the pipeline has no latent output), one entry an image.
    """
    blocks: tuple[Block, ...]
    layout: tuple[tuple[str, ...], ...] = (("uncond", "cond"),)
    """The runs of the denoiser in one step under guidance, in order, and the conditions of each run's chunks: one run
    of ("uncond", "cond"), or the two runs ("cond",) and ("uncond",). Without guidance it is one run of ("cond",)."""
    guidance: str = "cfg"
    """"cfg" can be switched on and off, "always" cannot; "embedded" is a number the model is given; "none" is a distilled
    model."""
    attentions: tuple[str, ...] = ()
    """Attention modules whose query, key and value a tap sees."""
    alone: bool = False
    """Whether diffusers' own pipeline fails for several images under guidance."""
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Named variants: what `build` takes for each (`{"dual attention": {"dual": True}}`)."""

    @property
    def two_pass(self) -> bool:
        """Whether the model runs once for every condition."""
        return len(self.layout) > 1

    @property
    def available(self) -> bool:
        """Whether the installed diffusers has this family, and can import it with what is installed."""
        try:
            return getattr(diffusers, self.pipeline, None) is not None
        except RuntimeError:
            return False

    def runs(self, guidance: bool) -> tuple[tuple[str, ...], ...]:
        """The runs of the denoiser in one step, and each one's chunks of conditions."""
        guided = self.guidance == "always" or (guidance and self.guidance == "cfg")
        return self.layout if guided else (("cond",),)


def families() -> dict[str, TinyFamily]:
    """Every family by its name, in alphabetical order, whether or not this diffusers has it."""
    found = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        family = getattr(importlib.import_module(f"{__name__}.{module.name}"), "FAMILY", None)
        if family is not None:
            found[family.name] = family
    return found
