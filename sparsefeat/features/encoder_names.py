"""Names of latents by an image-text encoder that the user has (CLIP, SigLIP), beside those by the words of captions.

Discover-then-Name (Rao et al., ECCV 2024): of an SAE in the encoder's own space latent i is called

    argmax over words w of cos(d_i, text(w))

Of any other SAE a latent has no place in that space: the mean of the encoder's vectors of the crops of its top images,
around where it is most active, stands in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import finite, number
from sparsefeat.features.search import Examples

WORDS_AT_ONCE = 256


class EncoderName(NamedTuple):
    """word: the nearest; cosine: of it. second, margin: the next, and how much nearer the first is. A margin of nothing says
    that either would do."""

    word: str
    cosine: float
    second: str
    margin: float


@torch.no_grad()
def name_by_encoder(
    vectors: Tensor, words: Sequence[str], encode_text: Callable[[list[str]], Tensor]
) -> list[EncoderName]:
    """A name for each of `vectors [n, width]`: decoder rows of an SAE in the encoder's space, or `example_vectors`.

    Args:
        words: two or more; the published vocabulary has 20,000.
        encode_text: gives `[words, width]`, for CLIP
            `lambda words: clip.get_text_features(**processor(text=words, return_tensors="pt", padding=True))`.

    Raises:
        ValueError: fewer than two words; vectors that are no [n, width]; what `encode_text` gives is of another width.
    """
    if isinstance(words, str) or len(set(words)) < 2:
        raise ValueError(f"words={words!r:.60} must be a list of two different words or more.")
    if not isinstance(vectors, Tensor) or vectors.ndim != 2:
        raise ValueError(f"vectors has shape {list(getattr(vectors, 'shape', []))}; give [n, width].")
    finite("vectors", vectors)
    known = list(dict.fromkeys(words))
    parts = [encode_text(known[i : i + WORDS_AT_ONCE]) for i in range(0, len(known), WORDS_AT_ONCE)]
    texts = finite("what encode_text gives", torch.cat([part.detach().float().cpu() for part in parts]))
    if texts.shape != (len(known), vectors.shape[1]):
        raise ValueError(
            f"encode_text gives {list(texts.shape)} for {len(known)} words and vectors are {vectors.shape[1]} wide; give an "
            "encoder of the same space."
        )
    cosines = F.normalize(vectors.detach().float().cpu(), dim=1) @ F.normalize(texts, dim=1).T
    best = cosines.topk(2, dim=1)
    return [
        EncoderName(known[first], one, known[second], one - other)
        for (first, second), (one, other) in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


@torch.no_grad()
def example_vectors(
    examples: Examples,
    images: Sequence[Any],
    latents: Sequence[int],
    encode_images: Callable[[list[Any]], Tensor],
    *,
    crop: float = 0.5,
) -> Tensor:
    """`[latents, width]`: the mean of the encoder's unit vectors of each latent's top images, cut to a square around the place
    where the latent is most active.

    Args:
        images: PIL, in the order in which `examples` saw them.
        encode_images: gives `[images, width]` of a list of PIL images.
        crop: the square's side as a share of the image's shorter side; 1 is the whole of it.

    Raises:
        ValueError: other images than `examples` saw, by their number; no latents; one without an image.
    """
    number("crop", crop, 0, 1, above=True)
    if len(images) != examples.n_drawn:
        raise ValueError(
            f"images has {len(images)} entries and examples are of {examples.n_drawn}; give all, in their order."
        )
    if not len(latents):
        raise ValueError("latents is empty; give the latents that are to be named.")
    found = []
    for latent in latents:
        top = examples.of(latent)
        if not top:
            raise ValueError(f"latent {latent} is active in no image, so it has no vector; leave it out of latents.")
        vectors = encode_images([_cut(images[example.image], example.map, crop) for example in top]).detach().float()
        found.append(F.normalize(finite("what encode_images gives", vectors), dim=1).mean(0).cpu())
    return torch.stack(found)


def _cut(image: Any, at: Tensor, crop: float) -> Any:
    """The square around the map's highest place, moved inside the image where it would stand out."""
    width, height = image.size
    side = max(1, round(crop * min(width, height)))
    place = int(at.argmax())
    y, x = (place // at.shape[1] + 0.5) * height / at.shape[0], (place % at.shape[1] + 0.5) * width / at.shape[1]
    left, top = (min(max(round(c - side / 2), 0), size - side) for c, size in ((x, width), (y, height)))
    return image.crop((left, top, left + side, top + side))
