"""Where latents and words are in the same places: a latent's map correlated with the maps of words.

maps, rec = sf.HeatMaps(), sf.Record(sae)
found = WordCorrelations(sae.n_latents, ["fox", "rocket"])
with sf.attach(pipe, maps, rec) as run:
    for prompt in prompts:
        pipe(prompt)
        found.add(run[rec], run[maps])
found.latents("fox")                  # the latents whose maps are most like the word's
sae.names = found.names()             # each latent by the word that it goes with
run[rec].heat(dict(found.latents("fox", 64))).mask(0.5)     # latents, each by its correlation, as a segmenter
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import number, whole
from sparsefeat.attention import HeatMapRecording
from sparsefeat.attention.words import NoSuchWordError
from sparsefeat.features.record import Recording
from sparsefeat.frozen import Frozen


class WordLatent(NamedTuple):
    """A latent and the correlation of its map with a word's, over all positions of all images that were added."""

    latent: int
    correlation: float


class WordCorrelations(Frozen):
    """Pearson's correlation of every latent's map with every word's, over the positions of all images added.

        r = (mean(x y) - mean(x) mean(y)) / (spread(x) spread(y)),     x the latent's activation, y the word's map

    A word's map is scaled from 0 to 1 in each image, so that no image counts for more. An image without the word counts
    with a map of zeros: a latent that is active there as well is no latent of the word.

    Memory: 8 n_latents (words + 2) bytes.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(self, n_latents: int, words: Sequence[str]):
        texts = isinstance(words, Sequence) and all(isinstance(word, str) and word.strip() for word in words)
        if isinstance(words, str) or not texts or not words or len(set(words)) != len(words):
            raise ValueError(f"words={words!r} must be a list of different words, as in ['fox', 'rocket'].")
        self.words: tuple[str, ...] = tuple(words)
        self.n_latents: int = whole("n_latents", n_latents)
        self._positions = 0
        self._x = torch.zeros(n_latents, dtype=torch.float64)
        self._xx = torch.zeros(n_latents, dtype=torch.float64)
        self._y = torch.zeros(len(words), dtype=torch.float64)
        self._yy = torch.zeros(len(words), dtype=torch.float64)
        self._xy = torch.zeros(n_latents, len(words), dtype=torch.float64)

    @property
    def positions(self) -> int:
        """How many were added."""
        return self._positions

    def add(self, recording: Recording, maps: HeatMapRecording) -> None:
        """All images of one call, each with the maps of those of the words that its prompt has.

        Raises:
            TypeError: one of the two is no such recording.
            ValueError: they are of different calls, or of one without texts; a word of a prompt has no map; as `add_maps`.
        """
        for name, given, kind in (("recording", recording, Recording), ("maps", maps, HeatMapRecording)):
            if not isinstance(given, kind):
                raise TypeError(f"{name} is {type(given).__name__}, not a {kind.__name__}; give what a session keeps.")
        for image in recording.images:
            prompt = recording.prompt(image)
            if prompt is None:
                raise ValueError(
                    "which words the images show is not known, as the call was given embeddings, not text: give their maps, "
                    "add_maps(recording, {'fox': map}, image)."
                )
            mapped = None if maps.prompts is None else maps.prompts[image // maps.images_per_prompt].prompt
            if maps.condition == "cond" and mapped not in (None, prompt):
                raise ValueError(f"recording is of {prompt!r} and maps of {mapped!r}: give what one call recorded.")
            here = [word for word in self.words if word.casefold() in prompt.casefold()]
            found: dict[str, Tensor] = {}
            for word in here:
                try:
                    found[word] = maps.word(word, image).scaled()
                except NoSuchWordError:  # a part of a longer word, or cut off
                    continue
            self.add_maps(recording, found, image)

    def add_maps(self, recording: Recording, maps: Mapping[str, Tensor], image: int = 0) -> None:
        """One image with the map [h, w] of each word that is in it: a mask, where one is known.

        Raises:
            ValueError: a word that is not counted; positions without a grid; a map that is not [h, w].
        """
        unknown = set(maps) - set(self.words)
        if unknown:
            raise ValueError(f"maps has {', '.join(sorted(unknown))}; the words are {', '.join(self.words)}.")
        if recording.grid is None or len(recording.grid) != 2:
            raise ValueError(f"the recording's positions have no grid (h, w), but {recording.grid}; maps need one.")
        latents, _, _ = recording.pooled(image)
        x = recording.maps(latents.tolist(), image).double().cpu().flatten(1)  # [active latents, positions]
        y = torch.zeros(len(self.words), x.shape[1], dtype=torch.float64)
        for word, given in maps.items():
            y[self.words.index(word)] = _on_grid(given, recording.grid).flatten()
        self._positions += x.shape[1]
        self._x[latents] += x.sum(1)
        self._xx[latents] += (x * x).sum(1)
        self._y += y.sum(1)
        self._yy += (y * y).sum(1)
        self._xy[latents] += x @ y.T

    def correlations(self) -> Tensor:
        """fp64 [n_latents, words]; 0 for a latent that was active nowhere, and for a word that was nowhere.

        Raises:
            ValueError: no image was added.
        """
        if not self.positions:
            raise ValueError("no image was added; add a recording and its maps first.")
        n = self.positions
        together = self._xy / n - self._x[:, None] / n * self._y[None, :] / n
        spread = [
            (squares / n - (sums / n) ** 2).clamp(min=0).sqrt()
            for squares, sums in ((self._xx, self._x), (self._yy, self._y))
        ]
        scale = spread[0][:, None] * spread[1][None, :]
        return torch.where(scale > 1e-12, together / scale.clamp(min=1e-300), 0)

    def latents(self, word: str, n: int = 10) -> list[WordLatent]:
        """The n latents that go with a word most, the highest first, equal ones by index.

        Raises:
            ValueError: a word that is not counted; `n` below 1; no image was added.
        """
        if word not in self.words:
            raise ValueError(f"word={word!r} is not one of {', '.join(self.words)}.")
        of_word = self.correlations()[:, self.words.index(word)]
        order = of_word.argsort(descending=True, stable=True)[: whole("n", n)]
        return [WordLatent(int(i), float(of_word[i])) for i in order if of_word[i] > 0]

    def names(self, least: float = 0.3) -> dict[int, str]:
        """Latent -> the word that it goes with most, of the latents whose correlation is at least that.

        Raises:
            ValueError: `least` is not from -1 to 1; no image was added.
        """
        number("least", least, -1, 1)
        highest, of = self.correlations().max(1)
        return {int(i): self.words[int(of[i])] for i in (highest >= least).nonzero()[:, 0]}


def _on_grid(given: Tensor, grid: tuple[int, ...]) -> Tensor:
    if given.ndim != 2 or not math.prod(given.shape):
        raise ValueError(f"a map has shape {list(given.shape)}; give [height, width].")
    given = given.detach().double().cpu()
    if tuple(given.shape) == tuple(grid):
        return given
    smaller = given.shape[0] >= grid[0] and given.shape[1] >= grid[1]
    return F.interpolate(given[None, None], size=tuple(grid), mode="area" if smaller else "bilinear")[0, 0]
