"""A survey of codes against brute force over dense ones, and what it keeps on disk."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from sparsefeat.features import Record
from sparsefeat.features.chance import halves
from sparsefeat.features.scores import area_under_curve
from sparsefeat.features.survey import LEAST_ROWS, Survey, nearest_by_decoder
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
PROMPTS = ["a fox", "a cat", "fox b", "dog c", "fox", "e"]
CONCEPTS = [("fox",) if "fox" in prompt else () for prompt in PROMPTS]
N, STEPS = 64, 2


@pytest.fixture(scope="module")
def sae() -> SAE:
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=N, k=4, hookpoint=AT)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def recordings(sae):
    pipe, record, kept = tiny_sd(), Record(sae), []
    for start in range(0, 6, 2):
        with attach(pipe, record) as run:
            pixels(pipe, PROMPTS[start : start + 2], steps=STEPS, seed=start, height=48, width=64)
            kept.append(run[record])
    return kept


@pytest.fixture(scope="module")
def dense(recordings) -> torch.Tensor:
    """[steps, images, positions, latents], the codes written out."""
    return torch.stack(
        [
            torch.cat([r.codes(step, i).dense()[None] for r in recordings for i in range(2)])
            for step in recordings[0].steps
        ]
    ).double()


def surveyed(recordings) -> Survey:
    survey = Survey(N, len(PROMPTS), top=3)
    for n, recording in enumerate(recordings):
        survey.add(recording, CONCEPTS[2 * n : 2 * n + 2])
    return survey


def test_density_strength_and_steps_are_those_of_the_dense_codes(recordings, dense) -> None:
    survey = surveyed(recordings)
    active = dense != 0
    torch.testing.assert_close(survey.density, active.double().mean((0, 1, 2)))
    expected = dense.sum((0, 1, 2)) / active.sum((0, 1, 2)).clamp(min=1)
    torch.testing.assert_close(survey.mean_active, expected, rtol=1e-6, atol=0)
    for latent in (0, 7, int(survey.density.argmax())):
        torch.testing.assert_close(survey.by_step(latent), dense[..., latent].mean((1, 2)), rtol=1e-6, atol=0)


def test_every_activation_is_in_the_bar_between_whose_edges_it_lies(recordings, dense) -> None:
    survey = surveyed(recordings)
    for latent in range(N):
        values = dense[..., latent][dense[..., latent] != 0].abs()
        edges, counts = survey.bars(latent)
        assert sum(counts) == len(values)
        assert counts == [int(((values >= a) & (values < b)).sum()) for a, b in itertools.pairwise(edges)]
        assert all(math.isclose(b / a, math.sqrt(2)) for a, b in itertools.pairwise(edges))


def test_areas_are_those_of_the_largest_activations_and_a_word_of_all_images_has_none(recordings, dense) -> None:
    survey = surveyed(recordings)
    peaks, has = dense.amax((0, 2)), torch.tensor([bool(names) for names in CONCEPTS])
    areas = survey.areas(["fox", "nowhere"])
    for latent in range(N):
        expected = area_under_curve(peaks[has, latent], peaks[~has, latent])
        assert float(areas[latent, 0]) == pytest.approx(expected, abs=1e-6)
    assert areas[:, 1].isnan().all()
    assert survey.areas([]).shape == (N, 0)


def test_companions_are_active_at_the_same_positions(recordings, dense) -> None:
    survey = surveyed(recordings)
    active = (dense != 0).reshape(-1, N).double()
    assert survey.rows_kept == len(active)  # so few that all are kept
    both, alone = active.T @ active, active.sum(0)
    cosine = both / (alone[:, None] * alone).clamp(min=1).sqrt()
    cosine.fill_diagonal_(0)
    for latent, found in enumerate(survey.companions(5)):
        if alone[latent] < LEAST_ROWS:
            assert found == []
            continue
        best = cosine[latent].topk(5).values
        assert [c.cosine for c in found] == pytest.approx(best[best > 0].tolist())
        for c in found:
            assert c.share == pytest.approx(float(both[latent, c.latent] / alone[latent]))
            assert c.base == pytest.approx(float(alone[c.latent] / len(active)))


def test_of_many_positions_some_are_kept_evenly(recordings, dense, monkeypatch) -> None:
    monkeypatch.setattr("sparsefeat.features.survey.ROWS_KEPT", 6 * STEPS * 5)
    assert surveyed(recordings).rows_kept == 6 * STEPS * 5
    assert surveyed(recordings)._kept[0].tolist() == surveyed(recordings)._kept[0].tolist()


def test_a_survey_that_is_loaded_goes_on_as_if_it_had_never_been_away(recordings, tmp_path) -> None:
    whole = surveyed(recordings)
    survey = Survey(N, len(PROMPTS), top=3)
    for n, recording in enumerate(recordings):
        survey.add(recording, CONCEPTS[2 * n : 2 * n + 2])
        survey.save(tmp_path / "kept")
        survey = Survey.load(tmp_path / "kept")
    assert survey.examples.prompts == PROMPTS
    assert survey.examples.concepts == CONCEPTS
    assert survey.timesteps == whole.timesteps
    assert torch.equal(survey.areas(["fox"]), whole.areas(["fox"]))
    assert list(survey.companions()) == list(whole.companions())
    for latent in range(N):
        assert survey.bars(latent) == whole.bars(latent)
        for mine, other in zip(survey.examples.of(latent), whole.examples.of(latent), strict=True):
            assert mine[:3] == other[:3]
            assert torch.equal(mine.map, other.map)


def test_recordings_that_do_not_belong_are_refused(recordings, sae) -> None:
    with pytest.raises(ValueError, match="recording is of 64 latents, the survey of 32"):
        Survey(32, 6).add(recordings[0])
    survey, record = Survey(N, 6), Record(sae)
    survey.add(recordings[0])
    with attach(pipe := tiny_sd(), record) as run:
        pixels(pipe, ["a"], steps=1)
        with pytest.raises(ValueError, match="other timesteps"):
            survey.add(run[record])


def test_the_nearest_latents_have_the_largest_cosines(monkeypatch) -> None:
    monkeypatch.setattr("sparsefeat.features.survey.LATENTS_AT_ONCE", 7)
    directions = torch.randn(20, 6, generator=torch.Generator().manual_seed(2))
    directions[3] = 0
    cosines = torch.nn.functional.cosine_similarity(directions[:, None], directions[None], dim=2)
    cosines.fill_diagonal_(-2)
    for latent, found in enumerate(nearest_by_decoder(directions, 4)):
        expected = [] if latent == 3 else cosines[latent].topk(4).values.tolist()
        assert [n.cosine for n in found] == pytest.approx(expected, abs=1e-6)
        assert latent not in [n.latent for n in found]


def test_halves_are_even_of_every_word() -> None:
    concepts = [(a, b) for a in "abcd" for b in "uvwxyz"] + [("lonely",), ()]
    choosing = halves(concepts)
    assert abs(2 * int(choosing.sum()) - len(concepts)) <= 2
    for word in "abcduvwxyz":
        has = torch.tensor([word in names for names in concepts])
        assert int((has & choosing).sum()) == int((has & ~choosing).sum())
