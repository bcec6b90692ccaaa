"""What chance gives: a name is earned, and how often noise earns one is what was said."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.stats
import torch

from sparsefeat.features import Examples, Recording, Statistics, area_under_curve, name_of, search
from sparsefeat.features.chance import best_of_latents, midranks

OBJECTS, STYLES = tuple(f"object {i}" for i in range(20)), ("oil", "ink", "chalk", "pixel")
CELLS = [(o, s) for s in range(4) for o in range(20)]
CONCEPTS = [(OBJECTS[o], STYLES[s]) for o, s in CELLS]
HALF = torch.tensor([(o + s) % 2 == 0 for o, s in CELLS])
WORDS = (*STYLES, *OBJECTS)


def noise(seed: int) -> torch.Tensor:
    return torch.rand(len(CELLS), generator=torch.Generator().manual_seed(seed))


def of(word: str) -> torch.Tensor:
    return torch.tensor([float(word in concepts) for concepts in CONCEPTS])


def test_ranks_of_equal_values_are_their_mean_as_in_scipy() -> None:
    values = torch.tensor([[3.0, 0.0, 0.0, 2.0, 0.0, 2.0, -1.0], [1.0] * 7])
    assert midranks(values).tolist() == scipy.stats.rankdata(values.numpy(), axis=-1).tolist()


@pytest.mark.parametrize("word", ["object 7", "ink"])
def test_a_word_that_is_there_is_found_with_its_held_out_area(word: str) -> None:
    peaks = noise(3) + 0.9 * of(word)
    found = name_of(peaks, CONCEPTS, WORDS, HALF, shuffles=2000)
    assert (found.word, found.n_words, found.is_a_name) == (word, 24, True)
    has, held = of(word).bool(), ~HALF
    pairs = list(itertools.product(peaks[held & has].tolist(), peaks[held & ~has].tolist()))
    assert found.auc == pytest.approx(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert (found.n_with, found.n_without) == (int((held & has).sum()), int((held & ~has).sum()))
    exact = scipy.stats.mannwhitneyu(
        peaks[held & has].double(), peaks[held & ~has].double(), alternative="greater", method="exact"
    ).pvalue
    assert abs(found.p - exact) < 4 * math.sqrt(exact / 2000) + 1 / 2000


def test_noise_is_given_a_name_as_rarely_as_said() -> None:
    """Of 300 latents of noise, at most one in twenty passes each half's test: 15 expected, 28 is 3.5 deviations above."""
    found = [name_of(noise(seed), CONCEPTS, WORDS, HALF, seed=seed, shuffles=500) for seed in range(300)]
    assert sum(one.p_chosen <= 0.05 for one in found) <= 28
    assert sum(one.p <= 0.05 for one in found) <= 28
    assert sum(one.is_a_name for one in found) <= 4  # 0.75 expected
    assert sum(one.auc > 0.75 for one in found) > 10  # which the held-out area alone would have called names


def test_a_word_that_only_one_half_shows_is_no_name() -> None:
    peaks = noise(5) + 2 * of("object 7") * HALF
    found = name_of(peaks, CONCEPTS, WORDS, HALF, shuffles=1000)
    assert found.word == "object 7"
    assert found.p_chosen < 0.02
    assert not found.is_a_name


def test_a_tendency_is_no_name() -> None:
    """A style that is no chance but tells two pairs of three apart."""
    many = CONCEPTS * 10
    peaks = torch.rand(800, generator=torch.Generator().manual_seed(1)) + 0.22 * of("ink").repeat(10)
    found = name_of(peaks, many, WORDS, HALF.repeat(10), shuffles=500)
    assert found.word == "ink"
    assert found.p < 0.01
    assert 0.6 < found.auc < 0.75
    assert not found.is_a_name


def test_a_latent_that_is_never_active_has_no_name() -> None:
    found = name_of(torch.zeros(len(CELLS)), CONCEPTS, WORDS, HALF, shuffles=100)
    assert (found.auc, found.p, found.p_chosen, found.is_a_name) == (0.5, 1.0, 1.0, False)


def test_what_cannot_be_named_is_refused() -> None:
    with pytest.raises(ValueError, match="concepts has 79 entries for 80 images"):
        name_of(noise(1), CONCEPTS[1:], WORDS)
    with pytest.raises(ValueError, match="no word of words has images with it"):
        name_of(noise(1), CONCEPTS, ["unicorn"])
    with pytest.raises(ValueError, match="no word of words has images with it"):
        name_of(noise(1), CONCEPTS, [])
    with pytest.raises(ValueError, match="peaks holds NaN"):
        name_of(noise(1).index_fill(0, torch.tensor([3]), math.nan), CONCEPTS, WORDS)


def test_a_random_half_is_taken_where_none_is_given() -> None:
    peaks = noise(3) + 0.9 * of("ink")
    assert name_of(peaks, CONCEPTS, WORDS, seed=1, shuffles=200) == name_of(
        peaks, CONCEPTS, WORDS, seed=1, shuffles=200
    )
    assert name_of(peaks, CONCEPTS, WORDS, seed=1, shuffles=200).word == "ink"


def test_the_best_of_many_latents_reaches_high_areas_by_chance_and_a_real_one_does_not() -> None:
    has = of("object 7").bool()
    peaks = torch.rand(3000, len(CELLS), generator=torch.Generator().manual_seed(9))
    parts = [peaks[:1024], peaks[1024:2048], peaks[2048:]]
    best = max(area_under_curve(row[has], row[~has]) for row in peaks[:500])
    chance, certain = best_of_latents(iter(parts), has, [best, 1.0])
    assert best > 0.9
    assert chance > 0.5  # of 3,000, something reaches what the best of 500 did
    assert certain < chance
    few = best_of_latents(iter([peaks[:1]]), has, [0.5])
    assert 0.4 < few[0] < 0.6  # one latent, the middle


def test_a_search_says_what_chance_gives() -> None:
    class Recorded(Recording):
        """What `Examples.add` asks of a recording: one image, three latents."""

        def __init__(self, peaks: torch.Tensor):
            super().__init__(n_latents=3)
            self.images, self.peaks = (0,), peaks

        def prompt(self, image: int) -> None:
            return None

        def pooled(self, image: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return torch.arange(3), self.peaks.double(), self.peaks.double()

        def maps(self, latents: list[int], image: int) -> torch.Tensor:
            return torch.zeros(len(latents), 2, 2)

    examples = Examples(3, top=1)
    rows = torch.stack([noise(1) + 2 * of("ink"), noise(2), noise(3)], 1)
    for peaks, concepts in zip(rows, CONCEPTS, strict=True):
        examples.add(Recorded(peaks), [concepts])
    assert torch.equal(torch.cat(list(examples.peaks_of_all())), rows.T)
    statistics = Statistics(["ink", "oil"], 3, timesteps=[1.0])
    statistics._blocks[1.0].total[:] = torch.tensor([[3.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    statistics._blocks[1.0].rows[:] = 10
    found = search(statistics, "ink", examples=examples)
    assert found[0].latent == 0
    assert found[0].p == pytest.approx(1 / 1001)
    assert examples.name(0, choosing=HALF).word == "ink"
    assert search(statistics, "ink")[0].p is None
