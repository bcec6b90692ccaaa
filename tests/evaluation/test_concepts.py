"""Concepts in units: what is measured, against scipy and by hand, and where there is nothing to find."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import jensenshannon

from sparsefeat.evaluation.concepts import halves, names, separability, separability_above_chance, sparse_probing
from sparsefeat.evaluation.stability import stability
from sparsefeat.evaluation.units import Units, components, latents, neurons, pooled
from sparsefeat.sae import SAE, SAEConfig

IMAGES, UNITS = 80, 12


def planted(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations `[images, units]`, of which unit 3 fires for concept 0, and 4 and 5 each for half of concept 1's images."""
    generator = torch.Generator().manual_seed(seed)
    member = torch.stack([torch.arange(IMAGES) % 4 == c for c in range(4)])
    activations = torch.rand(IMAGES, UNITS, generator=generator)
    activations[:, 3:6] = 0
    activations[member[0], 3] = 1 + torch.rand(int(member[0].sum()), generator=generator)
    with_1 = member[1].nonzero().flatten()
    activations[with_1[::2], 4] = 1.0
    activations[with_1[1::2], 5] = 1.0
    return activations, member


def test_halves_have_as_many_images_of_every_concept():
    _, member = planted()
    more = torch.cat([member, (torch.arange(IMAGES) % 5 == 0)[None]])
    choosing = halves(IMAGES, more)
    for concept in more:
        assert abs(2 * int(concept[choosing].sum()) - int(concept.sum())) <= 2
    assert torch.equal(halves(IMAGES, more), choosing)


def test_probes_find_what_one_unit_says_and_what_two_say_together():
    activations, member = planted()
    choosing = halves(IMAGES, member)
    one, two = (sparse_probing(activations, member[:2], k, choosing) for k in (1, 2))
    assert one[0] == 1.0
    assert 0.65 < one[1] < 0.85  # half of the images, the others tied
    assert two[1] == 1.0
    chance = sparse_probing(torch.rand(IMAGES, UNITS, generator=torch.Generator().manual_seed(5)), member, 1, choosing)
    assert 0.3 < sum(chance) / 4 < 0.7


def test_separability_is_the_mean_jensen_shannon_distance_of_the_histograms():
    activations, member = planted()
    found = separability(activations, member)
    for unit in (0, 3, 4):
        values, top = activations[:, unit].double(), float(activations[:, unit].max())
        edges = [-1.0, 0.0, *[(i / 4) * top for i in range(1, 4)], top * 2]  # of 20 images a concept: as many as 4 x 4
        shares = []
        for concept in member:
            counts = [
                ((values[concept] > low) & (values[concept] <= high)).sum() for low, high in itertools.pairwise(edges)
            ]
            shares.append([int(count) / int(concept.sum()) for count in counts])
        distances = [jensenshannon(shares[a], shares[b], 2) for a in range(4) for b in range(a + 1, 4)]
        assert float(found[unit]) == pytest.approx(sum(distances) / 6, abs=1e-6)
    assert found[3] == pytest.approx(0.5)  # of the six pairs the three with concept 0 have nothing in common


def test_separability_is_told_with_what_chance_alone_gives():
    activations, member = planted()
    planted_unit = separability_above_chance(activations[:, [3]], member)
    assert planted_unit.value > 3 * planted_unit.interval
    by_chance = separability_above_chance(activations[:, [0, 1, 2, 6, 7, 8]], member)
    assert abs(by_chance.value) < by_chance.interval  # far apart as histograms, and yet by chance
    few = torch.arange(activations.shape[0]) < 16  # four images a concept
    seen = separability_above_chance(activations[few][:, [3]], member[:, few])
    assert seen.interval > 2 * planted_unit.interval
    assert abs(seen.value - planted_unit.value) < seen.interval


def test_a_word_names_the_unit_that_fires_for_it_and_none_of_those_that_mean_nothing():
    generator = torch.Generator().manual_seed(1)
    words = ["fox", "owl", "cat", "key"]
    concepts = [[words[i % 4]] for i in range(IMAGES)]
    member = torch.stack([torch.arange(IMAGES) % 4 == c for c in range(4)])
    peaks = torch.rand(IMAGES, 30, generator=generator)
    choosing = halves(IMAGES, member)
    assert names(peaks, concepts, words, choosing).share <= 0.1
    peaks[:, 7] += member[2]
    peaks[:, 8] = 0
    found = names(peaks[:, 7:9], concepts, words, choosing)
    assert found == (1.0, 1.0, 1)


def test_stability_is_that_of_the_best_matching():
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(9, 20, generator=generator)
    order = torch.randperm(9, generator=generator)
    same = stability(first, 3 * first[order])
    assert same.cosine == pytest.approx(1)
    assert same.shared == 1
    second = torch.randn(12, 20, generator=generator)
    unit = [torch.nn.functional.normalize(one.double(), dim=1) for one in (first, second)]
    cosine = (unit[0] @ unit[1].T).numpy()
    rows, columns = linear_sum_assignment(-cosine)
    assert stability(first, second).cosine == pytest.approx(cosine[rows, columns].mean())
    greedy = cosine.max(1).mean()
    assert stability(first, second).cosine <= greedy
    with pytest.raises(ValueError, match="second has shape"):
        stability(first, second[:0])


def test_units_are_pooled_over_the_rows_of_each_image(monkeypatch):
    torch.manual_seed(0)
    rows, image = torch.randn(40, 6), torch.arange(40) % 5
    sae = SAE(SAEConfig(6, 20, k=3)).eval()
    dense = sae.encode(rows).dense().detach()
    monkeypatch.setattr("sparsefeat.evaluation.units.AT_A_TIME", 7 * 4 * 20)  # seven rows at a time
    found = pooled(latents(sae, "SAE"), rows, image)
    for number in range(5):
        torch.testing.assert_close(found.mean[number], dense[image == number].mean(0))
        torch.testing.assert_close(found.peak[number], dense[image == number].amax(0))
    median = neurons(rows).activations(rows, None)
    assert (median > 0).float().mean(0).tolist() == pytest.approx([0.5] * 12, abs=0.03)
    along = components(rows, 2).activations(rows, None)
    centred = (rows - rows.mean(0)).double()
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close((along[:, :2] - along[:, 2:]).double().abs(), (u * s)[:, :2].abs(), atol=1e-4, rtol=1e-4)
    assert isinstance(neurons(rows), Units)
