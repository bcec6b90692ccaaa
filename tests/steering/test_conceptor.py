"""The decomposition of a concept beside the formulas, and its use beside a plain hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sparsefeat as sf
from sparsefeat.steering import Decomposition
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

SETTINGS = {"template": "a big {}", "images": 2, "top": 4, "hidden": 16, "batch": 2, "num_inference_steps": 2}
WORDS = ["cat", "b", "c", "d", "e", "g", "h"]


def star_by_hand(pipe, found):
    table = pipe.text_encoder.get_input_embeddings().weight.detach().double()
    ids = [pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in found.words]
    total = sum(float(w) * table[i] for w, i in zip(found.weights, ids, strict=True))
    return (table.norm(dim=1).mean() * total / total.norm()).float()


def loss_by_hand(pipe, star, clean, t, noise):
    """Of noise that is predicted with w* in the place of the last word of "a big cat"."""
    cat = pipe.tokenizer("cat", add_special_tokens=False).input_ids[0]
    embedding = pipe.text_encoder.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda m, a, out: torch.where((a[0] == cat)[..., None], star, out))
    text = pipe.encode_prompt("a big cat", "cpu", 1, False)[0]
    hook.remove()
    alpha = pipe.scheduler.alphas_cumprod[t]
    said = pipe.unet(alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, t, text.expand(len(clean), -1, -1)).sample
    return float((said - noise).square().mean())


def test_the_weights_that_are_kept_lower_the_loss_and_make_the_vector():
    pipe = tiny_sd()
    # A denoiser to which the text matters: its cross-attention's outputs made larger.
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if "attn2.to_out" in name or "attn2.to_v" in name:
                parameter *= 4
    found = sf.decompose(pipe, "fox", dictionary=WORDS, steps=20, lr=0.1, **SETTINGS)
    assert sorted(found.words) == sorted(WORDS)
    assert (found.weights >= 0).all()
    assert (found.weights.diff() <= 0).all()
    torch.testing.assert_close(found.vector, star_by_hand(pipe, found), rtol=1e-4, atol=1e-6)
    first = sf.decompose(pipe, "fox", dictionary=WORDS, steps=1, lr=1e-9, **SETTINGS)
    clean = torch.cat(
        [
            pipe(
                "a big fox", num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(i)
            ).images
            for i in range(2)
        ]
    )
    noises = torch.randn(6, *clean.shape, generator=torch.Generator().manual_seed(8))
    times = [int(t) for t in pipe.scheduler.timesteps]
    with torch.no_grad():
        losses = [
            sum(loss_by_hand(pipe, one.vector, clean, times[i % 2], noise) for i, noise in enumerate(noises))
            for one in (first, found)
        ]
    assert losses[1] < losses[0]


def decomposition(pipe):
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    ids = [pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in WORDS[:3]]
    return Decomposition(tuple(WORDS[:3]), torch.tensor([3.0, 2.0, 1.0]), table[ids], float(table.norm(dim=1).mean()))


def test_the_vector_takes_the_place_of_the_word_in_the_conditional_prompt(tmp_path):
    pipe = tiny_sd()
    of = decomposition(pipe)
    fox = pipe.tokenizer("fox", add_special_tokens=False).input_ids[0]
    plain = pixels(pipe, "a fox", output_type="latent")
    seen = []

    def exchange(module, args, out):
        seen.append(1)
        return (
            torch.where((args[0] == fox)[..., None], of.vector, out) if len(seen) == 1 else out
        )  # the prompt comes first

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange)
    expected = pixels(pipe, "a fox", output_type="latent", negative_prompt="fox")
    hook.remove()
    tokens = sf.ConceptTokens(of, "fox")
    tokens.save(tmp_path / "tokens")
    for one in (tokens, sf.load_instrument(tmp_path / "tokens")):
        with sf.attach(pipe, one):
            found = pixels(pipe, "a fox", output_type="latent", negative_prompt="fox")
        np.testing.assert_allclose(found, expected, atol=1e-5)
    with sf.attach(pipe, tokens):
        assert np.array_equal(pixels(pipe, "a cat", output_type="latent"), pixels_of(pipe, "a cat"))
    assert not np.array_equal(plain, expected)


def pixels_of(pipe, prompt):
    return pixels(tiny_sd(), prompt, output_type="latent")


def test_words_are_taken_out_and_the_first_ones_kept():
    of = decomposition(tiny_sd())
    without = of.scaled({"cat": 0.0})
    torch.testing.assert_close(
        without.vector, of.norm * torch.nn.functional.normalize(2 * of.embeddings[1] + of.embeddings[2], dim=0)
    )
    assert of.top(2).words == ("cat", "b")
    assert without.top(1).words == ("b",)


def test_the_default_dictionary_has_neither_the_concept_nor_what_is_nearly_it():
    pipe = tiny_sd()
    table = pipe.text_encoder.get_input_embeddings().weight
    cat, fox, b = (pipe.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "fox", "b"))
    with torch.no_grad():
        table[cat] = 1.1 * table[fox]
        table[b] = table[fox] + 0.8 * table[fox].norm() * torch.nn.functional.normalize(table[b], dim=0)
    found = sf.decompose(pipe, "fox", size=5, steps=1, **SETTINGS)
    assert len(found.words) == 5
    assert "fox" not in found.words
    assert "cat" not in found.words
    assert "b" in found.words  # near, but not nearly the same


def test_what_is_wrong_is_said_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="template="):
        sf.decompose(pipe, "fox", template="a photo")
    with pytest.raises(ValueError, match="dictionary has 'dog'"):
        sf.decompose(pipe, "fox", dictionary=["cat", "dog"])
    with pytest.raises(ValueError, match="has not one CLIP"):
        sf.decompose(tiny_sdxl(), "fox")
    with pytest.raises(ValueError, match="has not one CLIP"):
        sf.attach(families()["sd3"].build(), sf.ConceptTokens(decomposition(pipe), "fox"))
    with pytest.raises(ValueError, match="is 3 tokens"):
        sf.attach(pipe, sf.ConceptTokens(decomposition(pipe), "dog"))
    with pytest.raises(ValueError, match="which is none of the words"):
        decomposition(pipe).scaled({"owl": 0.0})
    with pytest.raises(ValueError, match="weights holds NaN"):
        Decomposition(("a",), torch.tensor([torch.nan]), torch.ones(1, 4), 1.0)
