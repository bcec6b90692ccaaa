"""What chance gives: whether a word that seems to say what a latent is for, or a latent that seems to be for a word, says
more than the best of many would if there was nothing to find.

A latent ranks the images by its largest activation in each. How well that ranking tells the images with a word from the
others is the area under the curve (AUC, `area_under_curve`). The null: the same ranking of shuffled images. Of 50 words
with four images each, the best reaches an AUC of 0.9 there every twentieth time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number

# With 10,000 shuffles a share of 5 % is known to within 0.4 %.
SHUFFLES = 10_000
LEVEL = 0.05
# A word that is no chance but tells fewer than three pairs of images in four apart is a tendency, not a name.
LEAST_AUC = 0.75

# Ranks of so many latents are held at a time, for every image.
LATENTS_AT_ONCE = 1024


class Naming(NamedTuple):
    """The word that fits a latent best, and what speaks for it.

    word: chosen among `n_words` on one part of the images. p_chosen: share of the shuffles in which the best of all words
        is at least as surprising there.
    auc: of that word on the other images, which had no part in the choice; chance: what 95 % of the shuffles stay below
        there; p: share of the shuffles that reach `auc`. n_with, n_without: those images with the word and without.
    """

    word: str
    n_words: int
    p_chosen: float
    auc: float
    chance: float
    p: float
    n_with: int
    n_without: int

    @property
    def is_a_name(self) -> bool:
        """Both parts say so, each by less than one chance in twenty (one latent in four hundred that means nothing is
        given a name), and the word tells at least three of four pairs of the held-out images apart."""
        return self.p_chosen <= LEVEL and self.p <= LEVEL and self.auc >= LEAST_AUC


def name_of(
    peaks: Tensor,
    concepts: Sequence[Sequence[str]],
    words: Sequence[str],
    choosing: Tensor | None = None,
    *,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> Naming:
    """The word of `words` that fits a latent best, chosen on one part of the images and tried on the other.

    Args:
        peaks: [images] the latent's largest activation in each, as `Examples.peaks`.
        concepts: of each image, its words.
        words: to choose from; those that have an image and lack one in both parts are.
        choosing: bool [images], True where the choice is made; default a random half, by `seed`. Halve every word's
            images where you can: a word with few of them can only be chosen where it has some.
        shuffles: of the null; 200 images and 54 words take 0.1 s.

    Raises:
        ValueError: no word has images with it and without it in both parts.
    """
    peaks = finite("peaks", torch.as_tensor(peaks)).double().flatten()
    if len(concepts) != len(peaks):
        raise ValueError(f"concepts has {len(concepts)} entries for {len(peaks)} images; give one for each.")
    generator = torch.Generator().manual_seed(seed)
    if choosing is None:
        choosing = torch.zeros(len(peaks), dtype=torch.bool)
        choosing[torch.randperm(len(peaks), generator=generator)[: len(peaks) // 2]] = True
    member = torch.tensor([[word in of_image for of_image in concepts] for word in words]).reshape(len(words), -1)
    usable = [
        i
        for i, of_word in enumerate(member)
        if all(of_word[part].any() and not of_word[part].all() for part in (choosing, ~choosing))
    ]
    if not usable:
        raise ValueError("no word of words has images with it and images without it in both parts; add images.")
    auc, null = _against_shuffles(peaks[choosing], member[usable][:, choosing], shuffles, generator)
    # How many shuffles reach as far, word by word: the fewer, the more surprising. Of each shuffle, how many others do.
    reaching = (null >= auc - 1e-9).sum(0)
    best = min(range(len(usable)), key=lambda i: (int(reaching[i]), -float(auc[i])))
    columns = null.T.contiguous()
    others = shuffles - 1 - torch.searchsorted(columns.sort(1).values, columns - 1e-9)
    p_chosen = (1 + int((others.amin(0) <= reaching[best]).sum())) / (1 + shuffles)

    chosen = member[usable[best]][None]
    held_auc, held_null = _against_shuffles(peaks[~choosing], chosen[:, ~choosing], shuffles, generator)
    n_with = int(chosen[0, ~choosing].sum())
    return Naming(
        word=words[usable[best]],
        n_words=len(usable),
        p_chosen=p_chosen,
        auc=float(held_auc),
        chance=float(held_null.quantile(1 - LEVEL)),
        p=(1 + int((held_null >= held_auc - 1e-9).sum())) / (1 + shuffles),
        n_with=n_with,
        n_without=int((~choosing).sum()) - n_with,
    )


def best_of_latents(
    peaks: Iterator[Tensor], has: Tensor, aucs: Sequence[float], *, seed: int = 0, shuffles: int = 1000
) -> list[float]:
    """For each AUC, the share of the shuffles of the images in which any latent reaches it.

    Args:
        peaks: [latents, images] parts, as `Examples.peaks_of_all` gives them; together all latents searched among.
        has: bool [images], whether the image has the concept.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(len(has), generator=generator) for _ in range(shuffles)])
    shuffled = has[order].T.float()  # [images, shuffles]
    n_with, n_without = int(has.sum()), int((~has).sum())
    largest = torch.zeros(shuffles)
    for part in peaks:
        sums = midranks(part).float() @ shuffled
        largest = torch.maximum(largest, ((sums - n_with * (n_with + 1) / 2) / (n_with * n_without)).amax(0))
    return [(1 + int((largest >= number("auc", auc) - 1e-6).sum())) / (1 + shuffles) for auc in aucs]


def midranks(values: Tensor) -> Tensor:
    """fp64, the rank of each value along the last dimension, from 1; equal values share the mean of theirs."""
    ordered = values.contiguous().sort(-1).values
    below = torch.searchsorted(ordered, values.contiguous(), right=False)
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above + 1).double() / 2


def _against_shuffles(
    peaks: Tensor, member: Tensor, shuffles: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The AUC of each word [words], and of the same ranks dealt out at random [shuffles, words]."""
    ranks = midranks(peaks)
    n_with = member.sum(1).double()
    n_without = member.shape[1] - n_with

    def auc(of_ranks: Tensor) -> Tensor:
        return (of_ranks @ member.T.double() - n_with * (n_with + 1) / 2) / (n_with * n_without)

    order = torch.rand(shuffles, len(ranks), generator=generator).argsort(1)
    return auc(ranks), auc(ranks[order])
