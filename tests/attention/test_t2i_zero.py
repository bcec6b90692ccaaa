"""T2I-Zero's two instruments against eager derivations: loops over embeddings, and attention with its whole matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from sparsefeat.attention.t2i_zero import CorrectionBySimilarities, CrossTokenNMS
from sparsefeat.pipeline import attach
from tests.families import families
from tests.tiny import pixels, tiny_sd

PROMPT = "a fox and a cat"  # start, a, fox, a, n, d, a, cat
FOX, CAT = 2, 7


def corrected_by_hand(f, concepts, strength, window, quantile):
    after = f.copy()
    for c in concepts:
        s = f[c] * f
        limit = np.quantile(s, quantile)
        kept = np.where(s > limit, s, 0)
        kept = kept / kept.max()
        drawn = np.zeros(f.shape[1])
        for j in range(1, len(f)):
            if abs(j - c) <= window:
                drawn += kept[j] * f[j]
        after[c] = (1 - strength) * f[c] + strength * drawn
    return after


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_corrected_embeddings_are_those_of_the_formula_and_the_denoiser_is_given_them(guidance):
    pipe = tiny_sd(dtype=torch.float64)
    cond, uncond = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    wanted = corrected_by_hand(cond[0].detach().numpy(), [FOX, CAT], 0.4, 2, 0.7)
    given = {"prompt_embeds": torch.from_numpy(wanted)[None], "negative_prompt_embeds": uncond}
    expected = pixels(pipe, None, guidance_scale=guidance, output_type="latent", **given)
    instrument = CorrectionBySimilarities(["fox", "cat"], strength=0.4, window=2, quantile=0.7)
    with attach(pipe, instrument):
        found = pixels(pipe, PROMPT, guidance_scale=guidance, output_type="latent")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    plain = pixels(pipe, PROMPT, guidance_scale=guidance, output_type="latent")
    assert (found - plain).abs().max() > 1e-3


def test_a_strength_of_zero_changes_no_bit():
    pipe = tiny_sd()
    before = pixels(pipe, PROMPT)
    with attach(pipe, CorrectionBySimilarities(["fox"], strength=0)):
        assert np.array_equal(pixels(pipe, PROMPT), before)


@pytest.mark.parametrize("guidance", [True, False])
def test_the_text_of_every_frame_is_corrected_and_the_negative_prompts_is_not(guidance):
    family = families()["animatediff"]
    pipe, heard = family.build(), []
    pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: heard.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )

    def given():
        heard.clear()
        family.call(pipe, [PROMPT], guidance=guidance, steps=1)
        return heard[0]

    plain = given()
    with attach(pipe, CorrectionBySimilarities(["fox", "cat"], strength=0.4, window=2, quantile=0.7)):
        pipe.unet.register_forward_pre_hook(  # behind the instrument's
            lambda module, args, kwargs: heard.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        given()
    found = heard[1]
    frames = len(plain) // (1 + guidance)
    assert frames > 1
    assert torch.equal(found[:-frames], plain[:-frames])
    wanted = corrected_by_hand(plain[-1].double().numpy(), [FOX, CAT], 0.4, 2, 0.7)
    for frame in found[-frames:]:
        torch.testing.assert_close(frame.double(), torch.from_numpy(wanted), rtol=1e-5, atol=1e-5)


class Suppressing:
    """An attention processor with the whole matrix, in which of FOX and CAT the lower one is zero at every position."""

    def __init__(self, rows, grids):
        self.rows, self.grids = rows, grids

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        q = attn.to_q(hidden_states)
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        p = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
        h, w = self.grids[q.shape[2]]
        weights = np.array([[math.exp(-(y**2 + x**2) / 2) for x in (-1, 0, 1)] for y in (-1, 0, 1)])
        weights /= weights.sum()
        for row in self.rows:
            smooth = []
            for token in (FOX, CAT):
                padded = np.pad(p[row, :, :, token].mean(0).reshape(h, w).numpy(), 1, mode="reflect")
                smooth.append([(padded[y : y + 3, x : x + 3] * weights).sum() for y in range(h) for x in range(w)])
            fox_wins = torch.tensor([a >= b for a, b in zip(*smooth, strict=True)])
            p[row, :, ~fox_wins, FOX] = 0
            p[row, :, fox_wins, CAT] = 0
        out = (p @ v).transpose(1, 2).flatten(2)
        return attn.to_out[0](out)


@pytest.mark.parametrize(("guidance", "rows"), [(1.0, [0, 1]), (4.0, [2, 3])])
def test_suppressed_tokens_are_those_of_attention_with_its_matrix(guidance, rows):
    pipe = tiny_sd(dtype=torch.float64)
    call = {"guidance_scale": guidance, "height": 64, "width": 96, "num_images_per_prompt": 2, "output_type": "latent"}
    plain = pixels(pipe, PROMPT, **call)
    processor = Suppressing(rows, {16 * 24: (16, 24), 8 * 12: (8, 12), 4 * 6: (4, 6)})
    cross = {name: processor if ".attn2." in name else AttnProcessor2_0() for name in pipe.unet.attn_processors}
    pipe.unet.set_attn_processor(cross)
    expected = pixels(pipe, PROMPT, **call)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with attach(pipe, CrossTokenNMS(["fox", "cat"])):
        found = pixels(pipe, PROMPT, **call)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(pixels(pipe, PROMPT, **call), plain)


def test_both_may_be_attached_at_once_and_layers_chosen():
    pipe = tiny_sd()
    plain = pixels(pipe, PROMPT)
    instruments = CorrectionBySimilarities(["fox", "cat"]), CrossTokenNMS(["fox", "cat"], layers="up_blocks")
    with attach(pipe, *instruments):
        assert not np.array_equal(pixels(pipe, PROMPT), plain)
    assert np.array_equal(pixels(pipe, PROMPT), plain)


def test_what_they_cannot_do_is_refused():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="words='fox' must be a list of words"):
        CrossTokenNMS("fox")
    with pytest.raises(ValueError, match="must be two at least"):
        CrossTokenNMS(["fox"])
    with pytest.raises(ValueError, match=r"strength=2 must be"):
        CorrectionBySimilarities(["fox"], strength=2)
    with pytest.raises(ValueError, match=r"layers=\('nowhere',\) match no cross-attention module; there are: unet."):
        attach(pipe, CrossTokenNMS(["fox", "cat"], layers="nowhere"))
    with (
        attach(pipe, CrossTokenNMS(["fox", "dog"])),
        pytest.raises(ValueError, match="its words are: a, fox, and, cat"),
    ):
        pixels(pipe, PROMPT)
    joint = families()["sd3"].build()
    with pytest.raises(
        ValueError, match="CrossTokenNMS works on cross-attention, and StableDiffusion3Pipeline has none"
    ):
        attach(joint, CrossTokenNMS(["fox", "cat"]))
    family = families()["wan"]
    video = family.build()
    with attach(video, CrossTokenNMS(["fox", "cat"])), pytest.raises(ValueError, match="frames of a video, of which"):
        family.call(video, ["a fox and a cat"], guidance=False)
