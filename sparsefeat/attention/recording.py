"""What `HeatMaps` recorded of one call: maps by token, word, layer, step and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from sparsefeat.arguments import number
from sparsefeat.attention.encoded import EncodedPrompt
from sparsefeat.attention.heat_map import HeatMap
from sparsefeat.attention.heat_map_arguments import names_of
from sparsefeat.attention.reading import Direction, Kind
from sparsefeat.attention.sums import Grid, MapSum, Part, combined, positions
from sparsefeat.attention.words import NoSuchWordError, Token

Normalization = Literal["none", "steps", "tokens"]

# What `shares` counts the start token's map by: chosen on scenes of trained pairs, which `sparsefeat evaluate scenes` does not
# score.
BACKGROUND: Mapping[Kind, float] = {"cross": 0.5, "joint": 2.0, "text_renormalised": 2.0, "query_query": 2.0}


@dataclass(frozen=True)
class HeatMapRecording:
    """The maps of one call.

    Attributes:
        sums: probabilities summed, for each resolution (and layer and step, where these were kept apart).
        kind, direction, condition: what the maps are of, as in `HeatMaps`.
        n_tokens: how many text keys the attention has.
        columns: the positions of the tokens that have maps; None: all of them.
        evaluations: how often the denoiser ran (the number of steps for most schedulers).
        prompts: the prompts and what the text encoders were given for them, or None when the call was given embeddings.
        images_per_prompt: image i belongs to prompt i // images_per_prompt.
        concepts: what the maps are of, for kind "concept": its tokens are these, in this order.
        exact: whether every map is clamped at zero after it is resized, as DAAM does.
        without: why there are no maps, where there are none.
    """

    sums: Mapping[Part, MapSum]
    kind: Kind
    direction: Direction
    condition: str
    n_tokens: int
    columns: tuple[int, ...] | None
    evaluations: int
    prompts: tuple[EncodedPrompt, ...] | None
    images_per_prompt: int
    exact: bool = False
    concepts: tuple[str, ...] | None = None
    without: str = ""

    def __repr__(self) -> str:
        said = f"{self.kind}, {self.condition}, {self.evaluations} evaluations, {self.n_tokens} tokens"
        if not self.sums:
            return f"HeatMapRecording({said}, no maps)"
        return f"HeatMapRecording({self.n_images} images, {' x '.join(map(str, self.grid))}, {said})"

    @property
    def n_images(self) -> int:
        """How many images the call made.

        Raises:
            ValueError: as `grid`.
        """
        return len(self._any().total)

    def _any(self) -> MapSum:
        if not self.sums:
            raise ValueError(f"these HeatMaps have no maps of the call, as {self.without}.")
        return next(iter(self.sums.values()))

    @property
    def grid(self) -> Grid:
        """The largest grid that was read, (h, w) or (frames, h, w): the size of every map.

        Raises:
            ValueError: no attention to the text was seen in the call.
        """
        self._any()
        return max((part.grid for part in self.sums), key=positions)

    @property
    def device(self) -> torch.device:
        """Where the maps are.

        Raises:
            ValueError: as `grid`.
        """
        return self._any().total.device

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that were kept apart."""
        return tuple(dict.fromkeys(part.layer for part in self.sums if part.layer is not None))

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps that were kept apart."""
        return tuple(sorted({part.step for part in self.sums if part.step is not None}))

    @property
    def bytes(self) -> int:
        """What the maps take."""
        return sum(held.total.numel() * held.total.element_size() for held in self.sums.values())

    def tensor(
        self,
        image: int = 0,
        normalize: Normalization = "none",
        *,
        layer: str | None = None,
        step: int | None = None,
        head: int | None = None,
    ) -> Tensor:
        """All maps of one image [tokens, height, width] (of a video [tokens, frames, height, width]), padding tokens
        included; of the tokens of `words=` alone, in the order of their positions, where `HeatMaps` was given words.

        Args:
            image: index in the pipeline's output.
            normalize: "none": DAAM's, a mean over layers and heads and a sum over steps. "steps": also a mean over
                steps, so that a pixel's values are a part of a distribution over the keys. "tokens": divided at every
                pixel by the sum over the prompt's own tokens (special ones and padding left out) + 1e-6.
            layer, step, head: the maps of one layer (its path), step or head alone, where `keep=` kept them apart.

        Raises:
            ValueError: an image that there is not; a layer, step or head that was not kept apart; another `normalize`.
        """
        self._check_image(image)
        for name, asked, kept in (("layer", layer, self.layers), ("step", step, self.steps)):
            if asked is not None and asked not in kept:
                said = ", ".join(map(str, kept)) or f"nothing (HeatMaps(keep=[{name + 's'!r}]) keeps them)"
                raise ValueError(f"{name}={asked!r} was not kept apart; there is {said}.")
        if head is not None and self._any().total.shape[1] == 1:
            raise ValueError(f"head={head} was not kept apart; HeatMaps(keep=['layers', 'heads']) does.")

        def chosen(part: Part) -> bool:
            return layer in (None, part.layer) and step in (None, part.step)

        mean, _ = combined(self.sums, image, self.grid, self.exact, chosen, head)
        if normalize == "steps":
            return mean
        summed = mean * (1 if step is not None else self.evaluations)
        if normalize == "none":
            return summed
        if normalize == "tokens":
            own = list(range(self.n_tokens))
            if self.concepts is None:
                own = [self._column(token) for token in self._prompt(image).own(self.n_tokens)]
            return summed / (summed[own].sum(0) + 1e-6)
        raise ValueError(f'normalize={normalize!r} is not known; use "none", "steps" or "tokens".')

    def map(
        self,
        tokens: Sequence[int],
        image: int = 0,
        normalize: Normalization = "none",
        *,
        layer: str | None = None,
        step: int | None = None,
        head: int | None = None,
    ) -> HeatMap:
        """The mean of the maps of tokens named by their positions among the text's.

        Raises:
            ValueError: tokens that are none, or have no map; as `tensor`.
        """
        if (
            not isinstance(tokens, Sequence)
            or isinstance(tokens, str)
            or not all(isinstance(t, Integral) for t in tokens)
        ):
            raise ValueError(f"tokens={tokens!r} must be a list of token positions, as in .map([2, 3]).")
        wrong = [t for t in tokens if not 0 <= t < self.n_tokens]
        if wrong or not tokens:
            raise ValueError(f"tokens={list(tokens)} must name at least one of the {self.n_tokens} token positions.")
        columns = [self._column(token) for token in tokens]
        maps = self.tensor(image, normalize, layer=layer, step=step, head=head)
        return HeatMap(maps[columns].mean(0), f"tokens {', '.join(map(str, tokens))}")

    def _column(self, token: int) -> int:
        if self.columns is None:
            return token
        if token not in self.columns:
            raise ValueError(
                f"token position {token} has no map, as words= named others ({', '.join(map(str, self.columns))}); name its "
                "word too, or leave words= out."
            )
        return self.columns.index(token)

    def word(
        self,
        word: str,
        image: int = 0,
        occurrence: int | None = None,
        normalize: Normalization = "none",
        *,
        layer: str | None = None,
        step: int | None = None,
        head: int | None = None,
    ) -> HeatMap:
        """The map of a word or phrase: the mean over its tokens, of all its occurrences unless one is named. Of concepts, the
        map of one of them.

        Raises:
            ValueError: the word is not in the image's prompt, or the prompt is not known; as `tensor`.
        """
        tokens = self._indices(word, image, occurrence)
        return HeatMap(self.map(tokens, image, normalize, layer=layer, step=step, head=head).values, word)

    def shares(
        self,
        words: Sequence[str],
        image: int = 0,
        background: float | None = None,
        *,
        layer: str | None = None,
        step: int | None = None,
    ) -> tuple[HeatMap, ...]:
        """To mark things apart from one another and from the background: for each word, in their order,

            share(word) = P(word) / (sum over the words of P + background P(start) max P / max P(start)),

        from 0 to 1, with P(word) the word's map, max P the highest value of them all, and P(start) the map of the mark before
        the prompt. A text encoder that reads from left to right tells that mark nothing of the prompt: it is attended to where
        none of the prompt's words is looked for.

        Args:
            words: what is in the picture, one or several; as in `word`.
            background: what the mark's highest value counts beside the words' highest. Default: 0.5 of a cross-attention
                and 2 of a joint one, chosen on the embedded pipelines.

        Raises:
            ValueError: the text has no such mark (T5's), or `HeatMaps(words=[...])` left it out; as `word`.
        """
        named = names_of("words", words, "words=['fox', 'rocket']") or ()
        maps = torch.stack([self.word(word, image, layer=layer, step=step).values for word in named])
        told = self.kind in BACKGROUND and self.direction == "image_to_text"
        start = self._prompt(image).start(self.n_tokens) if told else []
        if not start:
            raise ValueError(
                "these maps have no attention to a mark before the prompt, by which shares tell the background: take each "
                "word's own map."
            )
        if self.columns is not None and not set(start) <= set(self.columns):
            raise ValueError(
                f"the mark before the prompt has no map: name its position too, HeatMaps(words={[*named, *start]})."
            )
        weight = BACKGROUND[self.kind] if background is None else number("background", background, 0)
        mark = self.map(start, image, layer=layer, step=step).values
        of_all = maps.sum(0) + weight * maps.max() * mark / mark.max().clamp(min=1e-30)
        return tuple(HeatMap(values / of_all.clamp(min=1e-30), word) for word, values in zip(named, maps, strict=True))

    def __getitem__(self, word: str) -> Tensor:
        """[images, height, width]: the word's map in each image, from 0 to 1, as an edit takes it for its mask:
        `Steer(sae, add={12: 8.0}, mask=run[maps]["cat"])`. Of an image whose prompt lacks the word, zeros.
        """
        found: list[Tensor | None] = []
        for image in range(self.n_images):
            try:
                found.append(self.word(word, image).scaled())
            except NoSuchWordError:
                if len(self.prompts or ()) == 1:
                    raise
                found.append(None)
        known = next((one for one in found if one is not None), None)
        if known is None:
            raise NoSuchWordError(f"word={word!r} is in none of the {len(self.prompts or ())} prompts of this call.")
        return torch.stack([torch.zeros_like(known) if one is None else one for one in found])

    def tokens(self, image: int = 0, normalize: Normalization = "none") -> tuple[HeatMap, ...]:
        """One map for each token of the prompt, start and end tokens included, labelled with the token's text.

        Raises:
            ValueError: the prompt is not known; as `tensor`.
        """
        maps = self.tensor(image, normalize)
        if self.concepts is not None:
            return tuple(HeatMap(values, concept) for values, concept in zip(maps, self.concepts, strict=True))
        wanted = range(self.n_tokens) if self.columns is None else self.columns
        named = (token for token in self._tokens(image) if token.index in wanted)
        return tuple(HeatMap(maps[self._column(token.index)], token.text) for token in named)

    def _indices(self, word: str, image: int, occurrence: int | None) -> tuple[int, ...]:
        if self.concepts is None:
            return self._prompt(image).indices(self.n_tokens, word, occurrence)
        if word not in self.concepts:
            raise ValueError(f"word={word!r} is none of the concepts: {', '.join(self.concepts)}.")
        return (self.concepts.index(word),)

    def _prompt(self, image: int) -> EncodedPrompt:
        if self.prompts is None:
            raise ValueError(
                "the prompts of this call are not known (it was given embeddings, not text); "
                "name token positions instead: .map([2, 3])."
            )
        self._check_image(image)
        return self.prompts[image // self.images_per_prompt]

    def _check_image(self, image: int) -> None:
        if not isinstance(image, int) or not 0 <= image < self.n_images:
            raise ValueError(f"image={image} is out of range; the call made {self.n_images} image(s), counted from 0.")

    def _tokens(self, image: int) -> tuple[Token, ...]:
        return self._prompt(image).tokens(self.n_tokens)
