"""How much a card may cost: which concepts, how many images of each. The methods and the metrics are the same in all."""

from __future__ import annotations

from dataclasses import dataclass

from sparsefeat.assets import N_STEPS
from sparsefeat.evaluation.emoji import OBJECT, STYLE, Target

ATTACK_STEPS = 500
"""Of the adversary, in every budget: it is fixed before erasers are compared."""


@dataclass(frozen=True)
class Budget:
    """objects, styles: indices of what is erased. n_target, n_other: images of it and of others, for each target.
    n_adjacent: images of each of the five nearest concepts. n_validation: images of the target, and as many others, on which
    a method's settings are chosen. n_settings: at most how many settings are tried. n_attacked: of how many objects the
    adversary is set on erasers. n_inverted: images of each of them, at least n_target. spared: names of erasers against which no
    words are learned. n_steered: images at every dose. n_explained: images that latents are taken from.
    n_pictures: pictures of each kind that maps are scored on. n_drawn: images that dictionaries are measured on.
    """

    name: str
    objects: tuple[int, ...]
    styles: tuple[int, ...]
    n_target: int
    n_other: int
    n_adjacent: int
    n_validation: int
    n_settings: int
    n_attacked: int
    n_inverted: int
    n_steered: int
    n_explained: int
    n_pictures: int
    n_drawn: int
    spared: tuple[str, ...] = ()
    attack_steps: int = ATTACK_STEPS
    n_steps: int = N_STEPS

    @property
    def targets(self) -> tuple[Target, ...]:
        return (*(Target(STYLE, i) for i in self.styles), *(Target(OBJECT, i) for i in self.objects))

    @property
    def attacked(self) -> tuple[Target, ...]:
        return tuple(Target(OBJECT, i) for i in self.objects[: self.n_attacked])


SPARED = (
    "CAD-Erase",
    "as many random latents",
    "ItD",
    "Concept Steerers",
    "APP",
    "clamp",
    "replace where",
    "concept lancet",
)
"""Erasers that leave much of the target or spoil much else: against them no words are learned."""

QUICK = Budget(
    "quick",
    objects=(7,),
    styles=(3,),
    n_target=12,
    n_other=12,
    n_adjacent=2,
    n_validation=4,
    n_settings=2,
    n_attacked=1,
    n_inverted=24,
    n_steered=8,
    n_explained=2,
    n_pictures=10,
    n_drawn=80,
    spared=SPARED,
)
FULL = Budget(
    "full",
    objects=(2, 7, 20),
    styles=(0, 3),
    n_target=32,
    n_other=40,
    n_adjacent=4,
    n_validation=4,
    n_settings=4,
    n_attacked=2,
    n_inverted=40,
    n_steered=24,
    n_explained=8,
    n_pictures=48,
    n_drawn=200,
    spared=SPARED,
)
