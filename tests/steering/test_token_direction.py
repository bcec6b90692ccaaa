"""Token directions beside numpy and a plain hook on the denoiser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sparsefeat as sf
from tests.families import families
from tests.tiny import pixels, tiny_sd, tiny_sdxl

PAIRS = [("a fox", "a red fox"), ("a cat", "a red cat"), ("fox", "red fox")]


def sae_of(width, at, n=48):
    torch.manual_seed(3)
    return sf.SAE(sf.SAEConfig(width, n, "relu", hookpoint=at)).requires_grad_(False).eval()


def by_hand(sae, pairs_of_rows, percentile):
    """The direction, of the embeddings of each sentence's own tokens."""
    weights, bias, centre = (t.double().numpy() for t in (sae.W_enc, sae.b_enc, sae.b_pre))
    masked = []
    for rows in pairs_of_rows:
        a, b = (np.maximum((r.double().numpy() - centre) @ weights.T + bias, 0).max(0) for r in rows)
        ratio = b / (a + 1e-6)
        masked.append(np.where(ratio > np.quantile(ratio, percentile / 100), b, 0))
    masked = np.stack(masked)
    values, vectors = np.linalg.eigh(masked.T @ masked)
    v = vectors[:, -1] * math.sqrt(values[-1] / len(masked))
    v = v * np.sign((masked @ v).sum())
    return torch.tensor(v @ sae.W_dec.double().numpy()).float()


def test_the_direction_is_that_of_the_formulas():
    pipe = tiny_sd()
    at = "text_encoder.final_layer_norm"
    sae = sae_of(32, at)
    found = sf.TokenDirection.fit(pipe, sae, PAIRS, ["fox"], percentile=80)
    rows = []
    for pair in PAIRS:
        embedded = [pipe.encode_prompt(text, "cpu", 1, False)[0][0].detach() for text in pair]
        ends = [pipe.tokenizer(text).input_ids.index(pipe.tokenizer.eos_token_id) for text in pair]
        rows.append([e[1 : end + 1] for e, end in zip(embedded, ends, strict=True)])  # without the mark that begins it
    torch.testing.assert_close(found.direction, by_hand(sae, rows, 80), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_the_edit_is_what_a_plain_hook_does_to_the_words_of_the_conditional_prompt(kind, tmp_path):
    tiny = families()["flux"]
    pipe = {"sd": tiny_sd, "sdxl": tiny_sdxl, "flux": tiny.build}[kind]()
    width = {"sd": 32, "sdxl": 56, "flux": 32}[kind]
    direction = 20 * torch.randn(width, generator=torch.Generator().manual_seed(1))
    edit = sf.TokenDirection(["fox"], direction, 2.0, growth=0.04)
    run = (
        (lambda: tiny.call(pipe, ["red fox"], guidance=True))
        if kind == "flux"
        else (lambda: pixels(pipe, "cat fox", output_type="latent"))
    )
    token = 1 if kind == "flux" else 2  # after the begin mark and one word
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    calls = []

    def before(module, args, kwargs):
        text = kwargs["encoder_hidden_states"].clone()
        step = len(calls) // 2 if kind == "flux" else len(calls)
        conditional = len(calls) % 2 == 0 if kind == "flux" else True
        calls.append(1)
        if conditional:
            text[-1, token] += 2.0 * min(math.exp(15 * 0.04 * step / 2) - 1, 1) * direction
        return args, {**kwargs, "encoder_hidden_states": text}

    plain = run()
    hook = denoiser.register_forward_pre_hook(before, with_kwargs=True)
    expected = run()
    hook.remove()
    edit.save(tmp_path / "edit")
    for one in (edit, sf.load_instrument(tmp_path / "edit")):
        with sf.attach(pipe, one):
            found = run()
        np.testing.assert_allclose(np.asarray(found), np.asarray(expected), atol=1e-5)
    assert np.abs(np.asarray(expected) - np.asarray(plain)).max() > 1e-6
    with sf.attach(pipe, sf.TokenDirection(["fox"], direction, 0.0)):
        assert (np.asarray(run()) == np.asarray(plain)).all()


def test_growth_is_capped():
    edit = sf.TokenDirection(["fox"], torch.zeros(32), 3.0, growth=1.0)
    assert [edit.factor(i, 40) for i in (0, 1)] == pytest.approx([0, 3 * math.expm1(15 / 40)])
    assert edit.factor(39, 40) == 3.0


def test_what_is_wrong_is_said_in_a_sentence():
    pipe = tiny_sd()
    sae = sae_of(32, "text_encoder.final_layer_norm")
    with pytest.raises(ValueError, match="pairs="):
        sf.TokenDirection.fit(pipe, sae, ["a fox"], ["fox"])
    with pytest.raises(ValueError, match="no latent is more active"):
        sf.TokenDirection.fit(pipe, sae, PAIRS, ["fox"], percentile=100)
    with pytest.raises(ValueError, match="direction holds NaN"):
        sf.TokenDirection(["fox"], torch.full((32,), torch.nan))
    with sf.attach(pipe, sf.TokenDirection(["fox"], torch.zeros(7) + 1)), pytest.raises(ValueError, match="7 entries"):
        pixels(pipe)
    with pytest.raises(ValueError, match="of several encoders"):
        sf.attach(families()["sd3"].build(), sf.TokenDirection(["fox"], torch.zeros(32)))
