"""Latents and words in the same places: correlations against numpy's, over several calls."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsefeat.attention import HeatMaps
from sparsefeat.features import Record, WordCorrelations
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"
WORDS = ["fox", "cat", "dog"]


def make_sae():
    torch.manual_seed(1)
    return SAE(SAEConfig(d_model=32, n_latents=40, k=4, hookpoint=AT)).requires_grad_(False).eval()


def test_correlations_are_pearsons_over_the_positions_of_all_images():
    pipe = tiny_sd()
    sae = make_sae()
    found = WordCorrelations(40, WORDS)
    x, y = [], []
    maps, record = HeatMaps(), Record(sae)
    with attach(pipe, maps, record) as run:
        for prompts in (["a fox", "a cat and a fox"], ["a cat"]):
            pixels(pipe, prompts)
            found.add(run[record], run[maps])
            for image, prompt in enumerate(prompts):
                x.append(run[record].maps(range(40), image).flatten(1).double().numpy())
                rows = []
                for word in WORDS:
                    if word not in prompt:
                        rows.append(np.zeros(x[-1].shape[1]))
                        continue
                    values = run[maps].word(word, image).values.double().numpy()
                    scaled = (values - values.min()) / (values.max() - values.min())
                    rows.append(scaled.reshape(8, 2, 8, 2).mean((1, 3)).flatten())  # 16 x 16 to the latents' 8 x 8
                y.append(np.stack(rows))
    x, y = np.concatenate(x, 1), np.concatenate(y, 1)
    got = found.correlations().numpy()
    assert found.positions == x.shape[1] == 3 * 64
    for latent in range(40):
        for word in range(2):
            wanted = np.corrcoef(x[latent], y[word])[0, 1] if x[latent].std() > 1e-9 else 0
            assert got[latent, word] == pytest.approx(wanted, abs=1e-6)
    assert (got[:, 2] == 0).all()  # a word that was nowhere
    best = found.latents("fox", 3)
    assert [one.latent for one in best] == np.argsort(-got[:, 0], kind="stable")[:3].tolist()
    assert best[0].correlation == pytest.approx(got[:, 0].max())
    least = float(np.sort(got.max(1))[-3])
    assert found.names(least) == {i: WORDS[got[i].argmax()] for i in range(40) if got[i].max() >= least}
    sae.names = found.names(least)


def test_a_word_without_a_map_is_not_taken_for_one_that_is_not_there():
    pipe, record, maps = tiny_sd(), Record(make_sae()), HeatMaps(words=["fox"])
    found = WordCorrelations(40, ["fox", "cat"])
    with attach(pipe, maps, record) as run:
        pixels(pipe, "cat and a fox", steps=1)
        with pytest.raises(ValueError, match="position 1 has no map, as words= named others"):
            found.add(run[record], run[maps])
        earlier = run[record]
        pixels(pipe, "foxes and a fox", steps=1)
        with pytest.raises(ValueError, match="recording is of 'cat and a fox' and maps of 'foxes and a fox'"):
            found.add(earlier, run[maps])
    embeds = pipe.encode_prompt("a fox", "cpu", 1, False)[0]
    assert found.positions == 0
    with attach(pipe, whole := HeatMaps(), record) as run:
        pixels(pipe, None, steps=1, prompt_embeds=embeds, guidance_scale=1.0)
        with pytest.raises(ValueError, match=r"was given embeddings, not text: give their maps, add_maps"):
            found.add(run[record], run[whole])


def test_masks_that_are_known_may_stand_in_for_maps_and_a_latent_is_a_segmenter():
    pipe = tiny_sd()
    sae = make_sae()
    record = Record(sae)
    with attach(pipe, record) as run:
        pixels(pipe, "a fox")
    recording = run[record]
    latent = recording.top(1)[0].latent
    mask = recording.map(latent) > recording.map(latent).mean()
    found = WordCorrelations(40, ["fox"])
    found.add_maps(recording, {"fox": mask})
    best = found.latents("fox", 1)[0]
    heat = recording.heat(best.latent)
    torch.testing.assert_close(heat.values, recording.map(best.latent))
    assert heat.label == f"latent {best.latent}"
    assert heat.mask(0.5, (64, 64)).shape == (64, 64)


def test_several_latents_are_a_segmenter_by_their_weights():
    pipe = tiny_sd()
    record = Record(make_sae())
    with attach(pipe, record) as run:
        pixels(pipe, ["a fox", "a cat"])
    recording = run[record]
    found = WordCorrelations(40, ["fox"])
    found.add_maps(recording, {"fox": recording.map(recording.top(1)[0].latent)})
    weights = dict(found.latents("fox", 3))
    assert len(weights) == 3
    step = recording.steps[-1]
    wanted = sum(weight * recording.map(latent, 1, step).double() for latent, weight in weights.items())
    heat = recording.heat(weights, 1, step)
    torch.testing.assert_close(heat.values.double(), wanted, rtol=1e-5, atol=1e-7)
    assert wanted.abs().max() > 0
    assert heat.label == ", ".join(f"latent {latent}" for latent in weights)
    assert recording.heat({3: -1.0}).values.equal(-recording.map(3))
    assert recording.heat(dict.fromkeys(range(5), 1.0)).label == "latent 0, latent 1, latent 2, 2 more"
    with pytest.raises(ValueError, match=r"latent=\{\} names no latents; give their weights"):
        recording.heat({})
    with pytest.raises(ValueError, match=r"latent\[3\]=nan must be a finite number"):
        recording.heat({3: float("nan")})
    with pytest.raises(ValueError, match="latent=40 is out of range"):
        recording.heat({3: 1.0, 40: 1.0})


def test_what_cannot_be_correlated_is_refused():
    with pytest.raises(ValueError, match="words='fox' must be a list of different words"):
        WordCorrelations(4, "fox")
    with pytest.raises(ValueError, match="list of different words"):
        WordCorrelations(4, ["fox", "fox"])
    found = WordCorrelations(4, ["fox"])
    with pytest.raises(ValueError, match="no image was added"):
        found.correlations()
    with pytest.raises(ValueError, match="word='cat' is not one of fox"):
        found.latents("cat")
