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
        concepts, words, choosing, seed, shuffles: as in `Namer`, which names many latents at less cost.

    Raises:
        ValueError: no word has images with it and without it in both parts.
    """
    peaks = finite("peaks", torch.as_tensor(peaks)).flatten()
    if len(concepts) != len(peaks):
        raise ValueError(f"concepts has {len(concepts)} entries for {len(peaks)} images; give one for each.")
    return Namer(concepts, words, choosing, seed=seed, shuffles=shuffles).name(peaks)


class Namer:
    """Finds the word that fits a latent best, for latent after latent on the same images and the same shuffles of them.

    Args:
        concepts: of each image, its words.
        words: to choose from; those that have an image and lack one in both parts are.
        choosing: bool [images], True where the choice is made; default a random half, by `seed`. Halve every word's
            images where you can (`halves`): a word with few of them can only be chosen where it has some.
        shuffles: of the null; 200 images and 54 words take 0.05 s a latent, and 4 bytes a shuffle and image are held.

    Raises:
        ValueError: no word has images with it and without it in both parts.
    """

    def __init__(
        self,
        concepts: Sequence[Sequence[str]],
        words: Sequence[str],
        choosing: Tensor | None = None,
        *,
        seed: int = 0,
        shuffles: int = SHUFFLES,
    ):
        generator = torch.Generator().manual_seed(seed)
        if choosing is None:
            choosing = torch.zeros(len(concepts), dtype=torch.bool)
            choosing[torch.randperm(len(concepts), generator=generator)[: len(concepts) // 2]] = True
        member = torch.tensor([[word in of_image for of_image in concepts] for word in words], dtype=torch.bool)
        member = member.reshape(len(words), len(concepts))  # of no words too
        usable = [
            i
            for i, of_word in enumerate(member)
            if all(of_word[part].any() and not of_word[part].all() for part in (choosing, ~choosing))
        ]
        if not usable:
            raise ValueError("no word of words has images with it and images without it in both parts; add images.")
        self.words: list[str] = [words[i] for i in usable]
        self._choosing = choosing
        self._chosen_on, self._tried_on = member[usable][:, choosing], member[usable][:, ~choosing]
        self._shuffles = [
            torch.rand(shuffles, len(part[0]), generator=generator, dtype=torch.float32).argsort(1).int()
            for part in (self._chosen_on, self._tried_on)
        ]

    def name(self, peaks: Tensor) -> Naming:
        """Of the latent with these `peaks` [images], its largest activation in each."""
        peaks = finite("peaks", peaks).double()
        shuffles = len(self._shuffles[0])
        auc, null = _against_shuffles(peaks[self._choosing], self._chosen_on, self._shuffles[0])
        # How many shuffles reach as far, word by word: the fewer, the more surprising. The best of all words of a shuffle is
        # as surprising if of one word no more others reach as far as it.
        reaching = (null >= auc - 1e-9).sum(0)
        best = min(range(len(self.words)), key=lambda i: (int(reaching[i]), -float(auc[i])))
        allowed = int(reaching[best])
        if allowed + 2 > shuffles:
            as_surprising = shuffles
        else:
            beyond = null.kthvalue(shuffles - (allowed + 1), dim=0).values  # reached by `allowed` others and one more
            as_surprising = int((null > beyond + 1e-9).any(1).sum())

        chosen = self._tried_on[best][None]
        held_auc, held_null = _against_shuffles(peaks[~self._choosing], chosen, self._shuffles[1])
        n_with = int(chosen.sum())
        return Naming(
            word=self.words[best],
            n_words=len(self.words),
            p_chosen=(1 + as_surprising) / (1 + shuffles),
            auc=float(held_auc),
            chance=float(held_null.quantile(1 - LEVEL)),
            p=(1 + int((held_null >= held_auc - 1e-9).sum())) / (1 + shuffles),
            n_with=n_with,
            n_without=chosen.shape[1] - n_with,
        )


def halves(concepts: Sequence[Sequence[str]]) -> Tensor:
    """bool [images]: half of the images, and of every word about half of its images, for `name_of` to choose on.

    Image after image goes to the half that has fewer with its words.
    """
    lead: dict[str, int] = {}
    choosing: list[bool] = []
    for words in concepts:
        more = sum(lead.get(word, 0) for word in words)
        ahead = more if more else 2 * sum(choosing) - len(choosing)
        choosing.append(ahead <= 0)
        for word in words:
            lead[word] = lead.get(word, 0) + (1 if choosing[-1] else -1)
    return torch.tensor(choosing, dtype=torch.bool)


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
    largest = torch.zeros(shuffles, dtype=torch.float32)
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


def _against_shuffles(peaks: Tensor, member: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """The AUC of each word [words], and of the same ranks dealt out by each `order` [shuffles, words]."""
    ranks = midranks(peaks)
    n_with = member.sum(1).double()
    n_without = member.shape[1] - n_with

    def auc(of_ranks: Tensor) -> Tensor:
        return (of_ranks @ member.T.double() - n_with * (n_with + 1) / 2) / (n_with * n_without)

    return auc(ranks), auc(ranks.index_select(0, order.view(-1)).view(order.shape))
