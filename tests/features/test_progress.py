"""The bar of several calls moves with every step and ends where it said it would."""

from __future__ import annotations

import pytest

import sparsefeat as sf
from sparsefeat.features.progress import Progress
from tests.tiny import pixels, tiny_sd


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def test_it_moves_with_every_step_by_the_images_of_the_call(pipe):
    with Progress(3, "drawing") as progress, sf.attach(pipe, progress):
        seen = []
        update = progress.bar.update
        progress.bar.update = lambda n=1: (seen.append(n), update(n))
        pipe(["fox", "cat"], num_inference_steps=4)
        assert seen[:4] == pytest.approx([0.5] * 4)
        pipe("fox", num_inference_steps=3)
    assert progress.bar.n == progress.drawn == 3


def test_fitting_an_erasure_is_seen_on_stderr(pipe, capsys):
    sae = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="unet.up_blocks.1.attentions.1")).eval()
    prompts = {"fox": ["a fox"], "cat": ["a cat", "cat"]}
    sf.Erase.fit(pipe, sae, "fox", prompts, n_latents=1, batch_size=2, num_inference_steps=2)
    assert "collecting statistics: 100%" in capsys.readouterr().err
    text = sf.SAE(sf.SAEConfig(d_model=32, n_latents=40, k=4, hookpoint="text_encoder.encoder.layers.0")).eval()
    sf.InterpretThenDeactivate.fit(pipe, text, ["fox"], ["cat", "a cat"], top_m=8, gate=False)
    assert "reading prompts: 100%" in capsys.readouterr().err


def test_a_session_with_nothing_else_draws_the_same(pipe):
    before = pixels(pipe, "fox")
    with Progress(1, "drawing") as progress, sf.attach(pipe, progress):
        assert (pixels(pipe, "fox") == before).all()
