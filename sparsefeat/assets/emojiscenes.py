"""EmojiScenes: two to four drawings of EmojiCanvas composed on one canvas, with the exact mask of each.

Nothing of it is stored: scenes are drawn from the shipped fifty objects when they are asked for, and the same seed
gives the same scenes. All objects of a scene are in one style. A caption names the objects from the back to the front
(`a noto emoji of a fox and a rocket`) and, in a part of the scenes of two, says where the first one is
(`a noto emoji of a fox to the left of a rocket`).

A pair of objects is either for training or held out (`held_out_pair`): a training scene contains no held-out pair, a
held-out scene is one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from sparsefeat.assets import emojicanvas

SIZE = 64

TRAIN, HELD_OUT = "train", "held-out"

RELATIONS = ("to the left of", "to the right of", "above", "below")

# Edge lengths in pixels by number of objects: as large as fits with little overlap.
SIZES = {2: (26, 38), 3: (22, 32), 4: (20, 28)}

# Two drawings may cover each other by this share of the smaller one's square.
MOST_OVERLAP = 0.25


@dataclass(frozen=True)
class Placed:
    """A drawing in a scene: `object` indexes `emojicanvas.OBJECTS`; its square's edge and corner in pixels."""

    object: int
    size: int
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """Drawings in one style from the back to the front. `relation` is where the first is, seen from the second."""

    style: int
    placed: tuple[Placed, ...]
    relation: str | None = None

    @property
    def objects(self) -> tuple[int, ...]:
        return tuple(part.object for part in self.placed)

    @property
    def caption(self) -> str:
        return caption(self.objects, self.style, self.relation)


@dataclass(frozen=True)
class Drawn:
    """`image` uint8 [64, 64, 3] on white; `masks` float32 [n, 64, 64] in [0, 1]: what of each drawing is seen, in the
    order of the scene. The masks and the background's share add up to 1 at every pixel."""

    image: np.ndarray
    masks: np.ndarray


def noun(object_index: int) -> str:
    """`a fox`, `an owl`."""
    return emojicanvas.prompt(emojicanvas.OBJECTS[object_index]).removeprefix("an emoji of ")


def caption(objects: Sequence[int], style: int | None = None, relation: str | None = None) -> str:
    """What a scene of these objects is called. `relation` (one of RELATIONS) needs exactly two objects."""
    if relation is not None and (relation not in RELATIONS or len(objects) != 2):
        raise ValueError(
            f"relation is {relation!r} for {len(objects)} objects; give two objects and one of {RELATIONS}"
        )
    head = emojicanvas.prompt(None, None if style is None else emojicanvas.STYLES[style])
    names = [noun(i) for i in objects]
    if relation is not None:
        return f"{head} of {names[0]} {relation} {names[1]}"
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"{head} of {listed}"


def held_out_pair(first: int, second: int) -> bool:
    """Whether scenes of these two objects are kept out of training: 132 of the 1,225 pairs, every object in some."""
    low, high = sorted((first, second))
    return (5 * low + 3 * high) % 8 == 0


def _place(rng: np.random.Generator, n: int) -> tuple[list[int], list[int], list[int]]:
    """Sizes and corners of `n` squares with at most MOST_OVERLAP between any two: drawn anew until they fit."""
    while True:
        sizes = rng.integers(SIZES[n][0], SIZES[n][1] + 1, n)
        left = (rng.random(n) * (SIZE - sizes + 1)).astype(int)
        top = (rng.random(n) * (SIZE - sizes + 1)).astype(int)
        for a, b in combinations(range(n), 2):
            wide = min(left[a] + sizes[a], left[b] + sizes[b]) - max(left[a], left[b])
            high = min(top[a] + sizes[a], top[b] + sizes[b]) - max(top[a], top[b])
            if max(wide, 0) * max(high, 0) > MOST_OVERLAP * min(sizes[a], sizes[b]) ** 2:
                break
        else:
            return sizes.tolist(), left.tolist(), top.tolist()


def _relation(first: Placed, second: Placed) -> str:
    """Where the first drawing's middle is, seen from the second's, along the axis where they are further apart."""
    right = first.left + first.size / 2 - second.left - second.size / 2
    down = first.top + first.size / 2 - second.top - second.size / 2
    if abs(right) >= abs(down):
        return RELATIONS[1] if right > 0 else RELATIONS[0]
    return RELATIONS[3] if down > 0 else RELATIONS[2]


def scenes(
    n: int, seed: int = 0, split: str = TRAIN, n_objects: Sequence[int] = (2, 2, 3, 4), related: float = 0.3
) -> list[Scene]:
    """`n` scenes, the same for the same arguments.

    `n_objects`: how many drawings a scene has, each entry equally likely. `related`: the share of scenes of two whose
    caption says where the first is. Held-out scenes are pairs, whatever `n_objects` says. Raises ValueError.
    """
    if split not in (TRAIN, HELD_OUT):
        raise ValueError(f"split is {split!r}; it is {TRAIN!r} or {HELD_OUT!r}")
    if not n_objects or not set(n_objects) <= set(SIZES):
        raise ValueError(f"n_objects is {tuple(n_objects)}; scenes have 2, 3 or 4 objects")
    rng = np.random.default_rng([seed, len(split)])
    made: list[Scene] = []
    while len(made) < n:
        count = 2 if split == HELD_OUT else int(rng.choice(n_objects))
        objects = rng.choice(len(emojicanvas.OBJECTS), count, replace=False).tolist()
        if any(held_out_pair(a, b) != (split == HELD_OUT) for a, b in combinations(objects, 2)):
            continue
        placed = tuple(Placed(*row) for row in zip(objects, *_place(rng, count), strict=True))
        relation = _relation(*placed) if count == 2 and rng.random() < related else None
        made.append(Scene(int(rng.integers(len(emojicanvas.STYLES))), placed, relation))
    return made


@functools.cache
def _canvas() -> emojicanvas.EmojiCanvas:
    return emojicanvas.load()


@functools.lru_cache(maxsize=8192)
def _drawing(style: int, object_index: int, size: int) -> np.ndarray:
    """The drawing at another size, float32 [size, size, 4] in [0, 1], colours multiplied by alpha.

    The filter has no negative lobes: no colour comes out stronger than its alpha.
    """
    image = Image.fromarray(_canvas().images[style, object_index], "RGBA").convert("RGBa")
    return np.asarray(image.resize((size, size), Image.Resampling.HAMMING), dtype=np.float32) / 255


def draw(scene: Scene) -> Drawn:
    """Compose a scene: each drawing over what lies behind it."""
    image = np.ones((SIZE, SIZE, 3), np.float32)
    masks = np.zeros((len(scene.placed), SIZE, SIZE), np.float32)
    for i, part in enumerate(scene.placed):
        drawing = _drawing(scene.style, part.object, part.size)
        window = (slice(part.top, part.top + part.size), slice(part.left, part.left + part.size))
        behind = 1 - drawing[..., 3]
        image[window] = drawing[..., :3] + image[window] * behind[..., None]
        masks[(slice(None), *window)] *= behind
        masks[(i, *window)] = drawing[..., 3]
    return Drawn(np.rint(image.clip(0, 1) * 255).astype(np.uint8), masks)
