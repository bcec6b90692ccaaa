"""Blindspots and names by an encoder, beside derivations of their own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

import sparsefeat as sf
from tests.tiny import pixels, tiny_sd

AT = "unet.up_blocks.1.attentions.1"


def make_sae():
    torch.manual_seed(1)
    return sf.SAE(sf.SAEConfig(32, 64, k=6, hookpoint=AT)).requires_grad_(False).eval()


def mean_code_by_hand(pipe, sae, image, prompt, seed):
    """The image noised to the middle of a schedule of 50 steps, through the UNet once."""
    clean = pipe.vae.encode(pipe.image_processor.preprocess(image)).latents * pipe.vae.config.scaling_factor
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))
    pipe.scheduler.set_timesteps(50)
    t = pipe.scheduler.timesteps[25:26]
    seen = []
    hook = pipe.unet.get_submodule(AT[5:]).register_forward_hook(lambda m, a, out: seen.append(out[0]))
    pipe.unet(pipe.scheduler.add_noise(clean, noise, t), t, pipe.encode_prompt(prompt, "cpu", 1, False)[0])
    hook.remove()
    return sae.encode(seen[0][0].flatten(1).T).dense().mean(0)


def test_real_and_generated_images_are_read_noised_alike():
    pipe, sae = tiny_sd(), make_sae()
    real = [Image.fromarray((255 * np.random.default_rng(i).random((64, 64, 3))).astype("uint8")) for i in range(2)]
    prompts = ["a fox", "a cat"]
    found = sf.Blindspots.of(pipe, sae, real, prompts, seed=3, num_inference_steps=2)
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            drawn = pipe(prompt, generator=torch.Generator().manual_seed(3 + i), num_inference_steps=2).images[0]
            for image, kept in ((real[i], found.real[i]), (drawn, found.generated[i])):
                expected = mean_code_by_hand(pipe, sae, image, prompt, 3 + i)
                torch.testing.assert_close(kept, expected, rtol=1e-3, atol=1e-4)
    by_hand = [1 / (1 + math.exp(-d)) for d in (found.generated.mean(0) - found.real.mean(0)).tolist()]
    np.testing.assert_allclose(found.delta, by_hand, rtol=1e-5)
    np.testing.assert_allclose(found.distances(), (found.generated - found.real).norm(dim=1), rtol=1e-5)


def test_latents_that_lack_and_that_are_too_much_are_told():
    real = torch.tensor([[0.0, 4.0, 1.0, 9.0], [0.0, 4.0, 1.0, 9.0]])
    generated = torch.tensor([[5.0, 0.0, 1.0, 0.0], [5.0, 1.0, 1.0, 0.0], [5.0, 0.5, 1.0, 0.0]])
    found = sf.Blindspots(real, generated)
    assert found.suppressed() == [3, 1]
    assert found.exaggerated() == [0]
    delta = np.array([1 / (1 + math.exp(-d)) for d in (5.0, -3.5, 0.0, -9.0)])
    around = delta - delta.mean()
    assert found.skewness == pytest.approx((around**3).mean() / (around**2).mean() ** 1.5)
    assert found.correlation(sf.Blindspots(generated, real)) == pytest.approx(-1)
    with pytest.raises(ValueError, match="need pairs"):
        found.distances()
    with pytest.raises(ValueError, match="of the same latents"):
        sf.Blindspots(real, generated[:, :3])


WORDS = {"red": [1.0, 0, 0], "green": [0, 1.0, 0], "blue": [0, 0, 1.0], "yellow": [1.0, 1.0, 0]}


def encode_text(words):
    return torch.tensor([WORDS[word] for word in words])


def encode_images(images):
    return torch.tensor([np.asarray(image, dtype="float32").mean((0, 1)) for image in images]) + 1e-3


def test_a_direction_in_the_encoders_space_is_called_by_the_nearest_word():
    vectors = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.2, 3.0], [0.5, 0.6, 0.0]])
    names = sf.name_by_encoder(vectors, list(WORDS), encode_text)
    assert [name.word for name in names] == ["red", "blue", "yellow"]
    assert names[0].cosine == pytest.approx(0.9 / math.hypot(0.9, 0.1))
    assert names[0].second == "yellow"
    assert names[0].margin == pytest.approx((0.9 - 1.0 / math.sqrt(2)) / math.hypot(0.9, 0.1))


def test_another_saes_latent_is_called_by_what_is_where_it_is_active():
    pipe, sae = tiny_sd(), make_sae()
    examples = sf.Examples(sae.n_latents, top=2)
    with sf.attach(pipe, sf.CollectExamples(sae, examples)):
        pixels(pipe, ["a fox", "a cat", "a dog"])
    latent = int(next(i for i in range(sae.n_latents) if examples.of(i)))
    images = []
    for number in range(3):
        paint = np.zeros((64, 64, 3), dtype="uint8") + np.array([255, 0, 0], dtype="uint8")
        for example in examples.of(latent):
            if example.image == number:  # green around the highest place, red elsewhere
                y, x = divmod(int(example.map.argmax()), example.map.shape[1])
                y, x = (int((c + 0.5) * 64 / s) for c, s in zip((y, x), example.map.shape, strict=True))
                paint[max(y - 12, 0) : y + 12, max(x - 12, 0) : x + 12] = [0, 255, 0]
        images.append(Image.fromarray(paint))
    near = sf.example_vectors(examples, images, [latent], encode_images, crop=0.1)
    assert sf.name_by_encoder(near, list(WORDS), encode_text)[0].word == "green"
    whole = sf.example_vectors(examples, images, [latent], encode_images, crop=1.0)
    assert sf.name_by_encoder(whole, list(WORDS), encode_text)[0].word == "red"


def test_what_is_wrong_is_said_in_a_sentence():
    with pytest.raises(ValueError, match="two different words"):
        sf.name_by_encoder(torch.eye(3), ["red"], encode_text)
    with pytest.raises(ValueError, match="of the same space"):
        sf.name_by_encoder(torch.eye(4), list(WORDS), encode_text)
    with pytest.raises(ValueError, match="images has 2 entries"):
        sf.example_vectors(sf.Examples(8), [1, 2], [0], encode_images)
    with pytest.raises(ValueError, match="give a caption for each"):
        sf.Blindspots.of(tiny_sd(), make_sae(), [1, 2], ["a fox"])
