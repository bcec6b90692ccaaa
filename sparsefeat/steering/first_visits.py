"""What chosen modules give for prompts at the first step of a run: the statistics that fits of directions are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.pipeline import Activations, Call, Context, Enough, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import for_several


class _FirstVisits(Instrument):
    """Keeps, of every image, the mean over positions of the conditional rows at each hookpoint's first run."""

    def __init__(self, at: Sequence[Hookpoint]):
        self.at = tuple(at)
        self.means: dict[Hookpoint, dict[int, Tensor]] = {}

    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self.at

    def begin_call(self, call: Call) -> None:
        self.means = {}  # in the order in which they run
        self._images = call.n_images or 1

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        assert context.hookpoint is not None
        rows = activations.rows.detach().view(context.batch, context.positions, -1)
        for row, (condition, image) in enumerate(context.entries):
            if condition == "cond":
                kept = self.means.setdefault(context.hookpoint, {})
                kept.setdefault(image, rows[row].mean(0, dtype=torch.float32).cpu())
        if len(self.means) == len(self.at) and all(len(kept) == self._images for kept in self.means.values()):
            raise Enough  # the rest of the call is not run


@torch.no_grad()
def first_means(
    pipe: Any,
    at: Sequence[Hookpoint],
    prompts: Sequence[str],
    call: dict[str, Any],
    *,
    beside: Sequence[Instrument] = (),
    seed: int = 0,
    batch: int = 4,
) -> dict[Hookpoint, Tensor]:
    """Of every hookpoint, in the order in which they first run, `[prompts, d_model]` in float32: the mean over positions of
    prompt i's conditional rows the first time the module runs, from the noise of seed + i. Nothing after the last
    hookpoint of the first step is run. `beside`: instruments that are at work before.
    """
    kept: dict[Hookpoint, list[Tensor]] = {}
    for first in range(0, len(prompts), batch):
        some = list(prompts[first : first + batch])
        visits = _FirstVisits(at)
        seeds = [torch.Generator().manual_seed(whole("seed", seed, 0) + first + i) for i in range(len(some))]
        with attach(pipe, *beside, visits):
            pipe(some, generator=seeds, **for_several(call, len(some)))
        for place, means in visits.means.items():
            kept.setdefault(place, []).append(torch.stack([means[image] for image in range(len(some))]))
    return {place: torch.cat(parts) for place, parts in kept.items()}


def check_prompts(name: str, prompts: Any, least: int = 2) -> list[str]:
    """A list of at least so many texts."""
    texts = [] if isinstance(prompts, str) or not isinstance(prompts, Sequence) else list(prompts)
    if len(texts) < least or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"{name} is {prompts!r:.60}; give a list of {least} prompts or more, which may repeat: each has noise of its own."
        )
    return texts


def check_place(at: Any) -> Hookpoint:
    """One hookpoint."""
    places = check_places(at)
    if len(places) > 1:
        raise ValueError(
            f"at={at!r:.60} are {len(places)} hookpoints; give one, and each of several a call of its own."
        )
    return places[0]


def check_places(at: Any) -> list[Hookpoint]:
    """One hookpoint or several, each once."""
    several = [at] if isinstance(at, (str, Hookpoint)) else list(at) if isinstance(at, Sequence) else []
    places = [place if isinstance(place, Hookpoint) else Hookpoint.parse(place) for place in several]
    if not places or len(set(places)) < len(places):
        raise ValueError(f"at={at!r:.60} must be one hookpoint or a list of different ones.")
    return places
