"""What the page's user changes: as instruments, in a folder, and as the lines of Python that do the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageChops

from sparsefeat.arguments import number, whole
from sparsefeat.sae import SAE
from sparsefeat.steering import Steer
from sparsefeat.steering.saved import SavableInstrument
from sparsefeat.steering.together import Together
from sparsefeat.whole import as_path, whole_folder


@dataclass(frozen=True)
class LatentEdit:
    """A latent that is added, or taken out: where it was painted, in some of the steps.

    sae: the SAE's number among the explorer's. amount: of the latent, added whether it is active or not; None takes it out.
    steps: the first and the last, counted from 1; None for all. mask: grey, white is where; None for everywhere.
    """

    sae: int
    latent: int
    amount: float | None
    steps: tuple[int, int] | None = None
    mask: Image.Image | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        whole("latent", self.latent, 0)
        if self.amount is not None:
            number("amount", self.amount)
        if self.steps is not None:
            first, last = self.steps
            whole("the first step", first)
            if last < first:
                raise ValueError(f"the last step, {last}, is before the first, {first}; exchange them")

    @property
    def key(self) -> tuple[Any, ...]:
        """Of two edits with one key the later replaces the earlier."""
        return ("latent", self.sae, self.latent)

    @property
    def is_nothing(self) -> bool:
        return self.amount == 0

    def _arguments(self) -> dict[str, Any]:
        how = {"scale": {self.latent: 0.0}} if self.amount is None else {"add": {self.latent: float(self.amount)}}
        return how if self.steps is None else {**how, "steps": range(self.steps[0] - 1, self.steps[1])}

    def instrument(self, saes: Sequence[SAE], fitted: Any = None) -> Steer:
        return Steer(saes[self.sae], **self._arguments(), mask=self.mask)

    def code(self, folder: str, part: int) -> str:
        """The expression that makes the instrument; its mask is read from `folder`."""
        given = [f"{name}={value!r}" for name, value in self._arguments().items()]
        if self.mask is not None:
            given.append(f"mask=Image.open({os.path.join(folder, mask_name(part))!r})")
        return f"sf.Steer({sae_name(self.sae)}, {', '.join(given)})"


BY_SAE = ("exchange", "saeuron")
"""Ways to erase a word by the text encoder's SAE."""


@dataclass(frozen=True)
class WordEdit:
    """A concept that is erased by its word. method: one of `BY_SAE`, or of `erasure.by_word.METHODS`."""

    word: str
    method: str = "uce"

    @property
    def key(self) -> tuple[Any, ...]:
        return ("word", self.word)

    @property
    def is_nothing(self) -> bool:
        return False

    def instrument(self, saes: Sequence[SAE], fitted: Callable[[WordEdit], SavableInstrument]) -> SavableInstrument:
        return fitted(self)

    def code(self, folder: str, part: int) -> str:
        """The expression that reads the fitted erasure from `folder`."""
        return f"sf.load_instrument({os.path.join(folder, f'part-{part}')!r}{', eraser' * (self.method in BY_SAE)})"


Edit: TypeAlias = LatentEdit | WordEdit


def with_edit(edits: Sequence[Edit], new: Edit) -> tuple[Edit, ...]:
    """The edits with `new` in the place of the earlier one of the same latent or word; one that is nothing leaves."""
    if any(edit.key == new.key for edit in edits):
        changed = [new if edit.key == new.key else edit for edit in edits]
    else:
        changed = [*edits, new]
    return tuple(edit for edit in changed if not edit.is_nothing)


def painted(layers: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Image.Image | None:
    """The mask of a brush's layers, whose alpha says where paint is; None where nothing was painted.

    size: (width, height) of the mask, to which it is brought by area.
    """
    mask: Image.Image | None = None
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        mask = alpha if mask is None else ImageChops.lighter(mask, alpha)
    if mask is not None and size is not None:
        mask = mask.resize(size, Image.Resampling.BOX)
    return mask if mask is not None and np.asarray(mask).any() else None


def mask_name(part: int) -> str:
    return f"mask-{part}.png"


def sae_name(i: int) -> str:
    """The SAE's name in the lines."""
    return "sae" if i == 0 else f"sae_{i}"


@dataclass(frozen=True)
class Source:
    """How a pipeline and its SAEs were opened, as lines of Python.

    imports: lines. pipe, saes, eraser: expressions; `eraser` is the SAE of a word's erasure.
    """

    imports: tuple[str, ...]
    pipe: str
    saes: tuple[str, ...]
    eraser: str | None = None


def python_lines(source: Source, edits: Sequence[Edit], folder: str, call: str, loaded: bool = False) -> str:
    """A whole program that draws the edited image.

    folder: where the edits were saved. call: the arguments of the pipeline's call. loaded: all edits come from the folder;
    else they are made one by one, and only masks and fitted erasures are read from it.
    """
    imports, opened = ["import sparsefeat as sf", "import torch", *source.imports], [f"pipe = {source.pipe}"]
    if loaded:
        made = [f"edits = [sf.load_instrument({folder!r})]"]
    else:
        latents = [edit for edit in edits if isinstance(edit, LatentEdit)]
        if any(edit.mask is not None for edit in latents):
            imports.insert(2, "from PIL import Image")
        opened += [f"{sae_name(i)} = {source.saes[i]}" for i in sorted({edit.sae for edit in latents})]
        if any(isinstance(edit, WordEdit) and edit.method in BY_SAE for edit in edits):
            opened.append(f"eraser = {source.eraser}")
        made = ["edits = [", *(f"    {edit.code(folder, i)}," for i, edit in enumerate(edits)), "]"]
    draw = f"image = pipe({call}).images[0]"
    drawn = [*made, "with sf.attach(pipe, *edits):", f"    {draw}"] if edits else [draw]
    return "\n".join([*imports, "", *opened, *drawn, 'image.save("edited.png")', ""])


def save_edits(
    folder: str | os.PathLike[str], edits: Sequence[Edit], instruments: Sequence[SavableInstrument], lines: str
) -> Path:
    """Write a folder that `load_instrument` opens, with the masks as pictures and the lines in `edit.py`."""
    if not edits:
        raise ValueError("there is nothing to save yet; steer a feature or erase a word first")
    place = as_path(folder, "the folder")
    with whole_folder(place, "the folder") as unfinished:
        Together(*instruments).save(unfinished)
        for i, edit in enumerate(edits):
            if isinstance(edit, LatentEdit) and edit.mask is not None:
                edit.mask.save(unfinished / mask_name(i))
        (unfinished / "edit.py").write_text(lines, "utf-8")
    return place
