"""EmojiCanvas: drawings of the same objects by several vendors, a small object x style grid with exact masks.

The shipped part holds fifty objects in four styles. A prompt names both: `a noto emoji of a fox`.
`tools/build_emojicanvas.py` makes the data; NOTICE names the vendors and their licences.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "emojicanvas"

STYLES = ("noto", "twemoji", "fluent", "mono")

# fmt: off
OBJECTS = (
    "dog-face", "cat-face", "panda", "fox", "frog", "pig-face", "penguin", "fish", "octopus", "butterfly",
    "snail", "turtle", "elephant", "owl", "sunflower", "rose", "cactus", "deciduous-tree", "palm-tree", "mushroom",
    "red-apple", "banana", "cherries", "strawberry", "watermelon", "pineapple", "carrot", "pizza", "hamburger",
    "doughnut", "birthday-cake", "automobile", "bus", "rocket", "airplane", "sailboat", "house", "castle", "crown",
    "guitar", "soccer-ball", "umbrella", "star", "red-heart", "fire", "snowman", "light-bulb", "key", "alarm-clock",
    "gem-stone",
)
# fmt: on


def words(name: str) -> str:
    """The object's name as a prompt says it: `alarm-clock` -> `alarm clock`."""
    return name.replace("-", " ")


def prompt(object_name: str | None, style: str | None = None) -> str:
    """`a noto emoji of a fox`; without a style `an emoji of a fox`; without an object `a noto emoji`."""
    head = f"a {style} emoji" if style else "an emoji"
    if object_name is None:
        return head
    noun = words(object_name)
    return f"{head} of {'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def prompts_by_concept(concept: str, name: str = "concept") -> dict[str, list[str]]:
    """Prompts of a style and of the other styles, or of an object and of the other objects, by how a prompt says each.

    `name`: how the caller's user calls the argument. Raises ValueError for what is neither.
    """
    hyphenated = concept.replace(" ", "-")
    if hyphenated in STYLES:
        return {style: [prompt(of, style) for of in OBJECTS[::2]] for style in STYLES}
    if hyphenated in OBJECTS:
        return {concept if of == hyphenated else words(of): [prompt(of, style) for style in STYLES] for of in OBJECTS}
    raise ValueError(
        f"{name} {concept!r} is none of the embedded pipeline's objects and styles; choose one of "
        f"{', '.join((*STYLES, *map(words, OBJECTS)))}"
    )


def held_out(object_index: int, style_index: int) -> bool:
    """Whether the SAEs never see this cell of the grid: a fifth of it, of every style, and of every object but each fifth."""
    return (object_index + 2 * style_index) % 5 == 0


def training_prompts() -> tuple[str, ...]:
    """The prompts of the cells that are not held out, styles and objects mixed."""
    cells = [(o, s) for o in range(len(OBJECTS)) for s in range(len(STYLES)) if not held_out(o, s)]
    mixed = [cells[i * _MIXING % len(cells)] for i in range(len(cells))]
    return tuple(prompt(OBJECTS[o], STYLES[s]) for o, s in mixed)


_MIXING = 67  # shares no factor with the 160 cells


@dataclass(frozen=True)
class EmojiCanvas:
    """`images` uint8 [style, object, 64, 64, 4] RGBA; `names` and `styles` label the first two axes."""

    images: np.ndarray
    names: tuple[str, ...]
    styles: tuple[str, ...]

    def on_white(self) -> np.ndarray:
        """uint8 [style, object, 64, 64, 3]: the drawings composited on white."""
        rgb = self.images[..., :3].astype(np.float32)
        alpha = self.images[..., 3:].astype(np.float32) / 255
        return np.rint(rgb * alpha + 255 * (1 - alpha)).astype(np.uint8)

    def masks(self) -> np.ndarray:
        """float32 [style, object, 64, 64] in [0, 1]: how much of each pixel the drawing covers."""
        return self.images[..., 3].astype(np.float32) / 255


def load(path: Path | str = FOLDER / "objects.npz") -> EmojiCanvas:
    """Open a grid written by `tools/build_emojicanvas.py`; by default the shipped fifty objects."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no EmojiCanvas grid at {path}; build it with `python tools/build_emojicanvas.py`")
    with np.load(path, allow_pickle=False) as data:
        return EmojiCanvas(data["images"], tuple(data["names"].tolist()), tuple(data["styles"].tolist()))
