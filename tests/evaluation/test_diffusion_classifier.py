from __future__ import annotations

import pytest
import torch

from sparsefeat.assets import emojicanvas, load_pipeline
from sparsefeat.evaluation.diffusion_classifier import diffusion_classifier, encoded
from tests.tiny import tiny_sd, tiny_sdxl


def test_errors_are_those_of_the_training_loss():
    pipe = load_pipeline()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts = ["a noto emoji of a fox", "a mono emoji of a fish", "an emoji"]
    found = diffusion_classifier(pipe, images, prompts, n_levels=1, n_steps=10, seed=7)
    # The middle of ten steps, from 0.15 of nine on: the first of one level is step 1 of the trailing schedule, t = 899.
    t = 899
    noise = torch.randn(1, *encoded(pipe, images).shape[1:], generator=torch.Generator().manual_seed(7))
    kept = pipe.scheduler.alphas_cumprod[t]
    for i, prompt in enumerate(prompts):
        with torch.no_grad():
            text = pipe.encode_prompt(prompt, "cpu", 1, False)[0].expand(2, -1, -1)
            latents = encoded(pipe, images)
            seen = kept.sqrt() * latents + (1 - kept).sqrt() * noise
            said = pipe.unet(seen, t, encoder_hidden_states=text).sample
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        wanted = (said - velocity).double().square().sum((1, 2, 3))
        assert torch.allclose(found[:, i], wanted, rtol=1e-4)


@pytest.mark.embedded
def test_the_embedded_pipeline_finds_a_drawings_own_prompt_likeliest():
    pipe = load_pipeline()
    chosen = [3, 7, 20, 33]
    drawings = torch.from_numpy(emojicanvas.load().on_white()[0, chosen]).permute(0, 3, 1, 2).float() / 255
    prompts = [emojicanvas.prompt(emojicanvas.OBJECTS[o], "noto") for o in chosen]
    errors = diffusion_classifier(pipe, drawings, prompts, n_levels=3)
    assert (errors.argmin(1) == torch.arange(4)).sum() >= 3


def test_other_pipelines_are_refused():
    with pytest.raises(ValueError, match="text alone"):
        diffusion_classifier(tiny_sdxl(), torch.rand(1, 3, 64, 64), ["a"])
    with pytest.raises(ValueError, match="n_levels"):
        diffusion_classifier(tiny_sd(), torch.rand(1, 3, 64, 64), ["a"], n_levels=0)
