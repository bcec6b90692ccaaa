"""Examples and search against brute force over dense codes."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.features import CollectExamples, Examples, Record, collect_statistics, search
from sparsefeat.features.scores import area_under_curve
from sparsefeat.features.search import Found
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
PROMPTS = ["a fox", "a cat", "fox b", "dog c", "fox", "e"]


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


@pytest.fixture(scope="module")
def sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=64, k=4, hookpoint=AT)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def recorded(pipe, sae):
    """Examples of three calls of two prompts, and the dense maps [images, latents, h, w], means over steps."""
    examples = Examples(64, top=2)
    collect = CollectExamples(sae, examples, {p: "fox" for p in PROMPTS if "fox" in p})
    record, dense, peaks = Record(sae), [], []
    with attach(pipe, collect, record) as run:
        for start in range(0, 6, 2):
            pixels(pipe, PROMPTS[start : start + 2], steps=2, seed=start, height=48, width=64)
            for image in range(2):
                codes = torch.stack([run[record].codes(step, image).dense() for step in run[record].steps])
                dense.append(codes.mean(0).T.view(64, 6, 8))
                peaks.append(codes.amax((0, 1)))
        assert run[collect] is examples
    return examples, torch.stack(dense), torch.stack(peaks)


def test_an_example_of_a_text_is_the_first_image_of_its_prompt(pipe):
    torch.manual_seed(0)
    at = "text_encoder.encoder.layers.0"
    sae = SAE(SAEConfig(d_model=32, n_latents=40, activation="relu", hookpoint=at)).requires_grad_(False).eval()
    examples, prompts = Examples(40, top=9), []
    with attach(pipe, CollectExamples(sae, examples)):
        for call in (["a fox", "a cat"], ["fox"], ["cat", "a b"]):
            pipe(call, num_inference_steps=1, num_images_per_prompt=2, output_type="latent")
            prompts += [prompt for prompt in call for _ in range(2)]  # what the list of all images is of
    latent = int(examples.active[0])
    assert {example.image for example in examples.of(latent)} <= {0, 2, 4, 6, 8}
    assert len(examples.of(latent)) > 2
    assert all(prompts[example.image] == example.prompt for example in examples.of(latent))
    assert (len(examples), examples.n_drawn) == (5, 10)
    again = Examples.from_state(*examples.state())
    assert [example.image for example in again.of(latent)] == [example.image for example in examples.of(latent)]


def test_the_examples_of_a_latent_are_the_images_with_the_highest_mean(recorded):
    examples, maps, _ = recorded
    assert len(examples) == 6
    scores = maps.double().mean((2, 3))  # [images, latents]
    for latent in range(64):
        order = scores[:, latent].argsort(descending=True, stable=True)
        expected = [i for i in order.tolist() if scores[i, latent] > 0][:2]
        found = examples.of(latent)
        assert [e.image for e in found] == expected
        for example in found:
            assert example.prompt == PROMPTS[example.image]
            assert example.score == pytest.approx(float(scores[example.image, latent]), rel=1e-5)
            torch.testing.assert_close(example.map, maps[example.image, latent], rtol=2e-3, atol=2e-3)
    assert len(examples._maps) == sum(len(examples.of(latent)) for latent in range(64))  # none is left behind


def test_the_area_under_the_curve_is_of_the_largest_activations(recorded):
    examples, _, peaks = recorded
    has = torch.tensor(["fox" in p for p in PROMPTS])
    for latent in range(0, 64, 7):
        torch.testing.assert_close(examples.peaks(latent), peaks[:, latent])
        expected = area_under_curve(peaks[has, latent], peaks[~has, latent])
        assert examples.area_under_curve(latent, "fox") == pytest.approx(expected)


def test_a_search_ranks_by_the_normalised_mean_difference(pipe, sae, recorded):
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 48, "width": 48}
    statistics = collect_statistics(pipe, sae, {"fox": ["a fox"], "cat": ["a cat"], "dog": ["dog c"]}, **options)
    mu, other = statistics.mean("fox"), statistics.mean(("cat", "dog"))
    score = mu / (mu.sum() + 1e-8) - other / (other.sum() + 1e-8)
    found = search(statistics, "fox", 3, examples=recorded[0])
    assert [f.latent for f in found] == score.topk(3).indices.tolist()
    assert [f.score for f in found] == pytest.approx(score.topk(3).values.tolist())
    assert found[0].auc == recorded[0].area_under_curve(found[0].latent, "fox")
    at = search(statistics, "fox", 1, timestep=900)[0]
    nearest = statistics.nearest(900)
    assert at.mean == pytest.approx(float(statistics.mean("fox", nearest)[at.latent]))
    assert at.auc is None


def test_errors_name_the_mistake(recorded, sae):
    with pytest.raises(ValueError, match=r"concept='cow' belongs to 0 of 6 images"):
        recorded[0].area_under_curve(3, "cow")
    few = Examples(64, latents=[3])
    with pytest.raises(ValueError, match="latent=4 is not among those"):
        few.of(4)
    with pytest.raises(ValueError, match="examples are of 12 latents, the SAE has 64"):
        CollectExamples(sae, Examples(12))


def test_what_newcomers_give_in_the_place_of_what_is_wanted_is_refused_with_the_remedy(recorded, sae):
    examples, *_ = recorded
    with pytest.raises(TypeError, match=r"n_latents is an SAE; give its number of latents, Examples\(sae\.n_latents\)"):
        Examples(sae)
    with pytest.raises(ValueError, match=r"concepts=\['a fox'\] must map each prompt to its words"):
        CollectExamples(sae, examples, ["a fox"])
    active = examples.active[0].item()
    with pytest.raises(ValueError, match="a line of a list; give its number"):
        examples.of(Found(active, 1.0, 1.0, 1.0, None, None))
    with pytest.raises(ValueError, match=r"the images were added without words, .* give CollectExamples concepts="):
        Examples(64).name(active)
    assert str(examples) == "Examples(6 images, 64 latents, the top 2 of each)"
    assert "tensor" not in str(examples.of(active)[0])
