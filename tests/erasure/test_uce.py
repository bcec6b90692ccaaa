"""UCE's closed form against the published normal equations, solved for each weight in fp64."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.erasure import UCE, TextEmbeddings
from sparsefeat.erasure.by_word import erase_by_word
from sparsefeat.erasure.uce import TextMap
from sparsefeat.pipeline import attach
from sparsefeat.steering import load_instrument
from tests.families import families
from tests.tiny import tiny_sd, tiny_sdxl

CALL = {"height": 32, "width": 32}
ERASE, GUIDE, KEEP = ["fox", "a cat"], ["dog", ""], ["red b"]


def published(w, erase, guide, keep, s_e=1.0, s_p=1.0, lamb=0.5):
    """Both sides of the normal equations, term by term; a bias is no part of them."""
    w = w.double()
    left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
    for c, a in zip(erase, guide, strict=True):
        left = left + s_e * torch.outer(w @ a, c)
        right = right + s_e * torch.outer(c, c)
    for c in keep:
        left = left + s_p * torch.outer(w @ c, c)
        right = right + s_p * torch.outer(c, c)
    return left @ torch.inverse(right)


def sd_embeddings(pipe, text):
    given = pipe.encode_prompt(text, "cpu", 1, False)[0][0]
    return [given[len(pipe.tokenizer(text).input_ids) - 2]]


def sdxl_embeddings(pipe, text):
    given = pipe.encode_prompt(text, device="cpu", do_classifier_free_guidance=False)[0][0]
    return [given[len(pipe.tokenizer(text).input_ids) - 2]]


def sd3_embeddings(pipe, text):
    given = pipe.encode_prompt(text, text, text, max_sequence_length=12, do_classifier_free_guidance=False)[0][0]
    clip, t5 = len(pipe.tokenizer(text).input_ids) - 2, max(len(pipe.tokenizer_3(text).input_ids) - 2, 0)
    return [given[clip], given[16 + t5]]


def flux_embeddings(pipe, text):
    given = pipe.encode_prompt(text, text, max_sequence_length=16)[0][0]
    return [given[max(len(pipe.tokenizer_2(text).input_ids) - 2, 0)]]


CASES = {
    "sd": (lambda: tiny_sd(), sd_embeddings, {}, "attn2.to_k"),
    "sdxl": (lambda: tiny_sdxl(), sdxl_embeddings, {}, "attn2.to_v"),
    "sd3": (families()["sd3"].build, sd3_embeddings, {"max_sequence_length": 12}, "context_embedder"),
    "flux": (families()["flux"].build, flux_embeddings, {"max_sequence_length": 16}, "context_embedder"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_of_the_published_equations(name):
    build, embeddings, call, kind = CASES[name]
    pipe = build()
    root = pipe.unet if "sd" in name and name != "sd3" else pipe.transformer
    before = {n: p.detach().clone() for n, p in root.named_parameters()}
    with torch.no_grad():
        of = {text: [row.double() for row in embeddings(pipe, text)] for text in (*ERASE, *GUIDE, *KEEP)}
    erase = UCE.fit(pipe, ERASE, guide=GUIDE, preserve=KEEP, tokens="last", **CALL, **call)
    c, a, p = ([row for text in texts for row in of[text]] for texts in (ERASE, GUIDE, KEEP))
    checked = 0
    with attach(pipe, erase):
        for n, weight in root.named_parameters():
            if kind in n and n.endswith("weight"):
                wanted = published(before[n], c, a, p)
                assert (weight.double() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), n
                assert (wanted - before[n].double()).abs().max() >= 1e-3 * wanted.abs().max(), n
                checked += 1
    assert checked > 0
    assert all(torch.equal(weight, before[n]) for n, weight in root.named_parameters())


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_or_all_positions_from_the_last_token_on(name):
    build, _, call, kind = CASES[name]
    pipe = build()
    root = pipe.unet if name == "sd" else pipe.transformer
    with torch.no_grad():
        if name == "sd":
            of = {text: pipe.encode_prompt(text, "cpu", 1, False)[0][0].double() for text in (*ERASE, *GUIDE, *KEEP)}
            last = {text: len(pipe.tokenizer(text).input_ids) - 2 for text in of}
        else:
            of = {
                text: pipe.encode_prompt(text, text, max_sequence_length=16)[0][0].double()
                for text in (*ERASE, *GUIDE, *KEEP)
            }
            last = {text: max(len(pipe.tokenizer_2(text).input_ids) - 2, 0) for text in of}
    c, a = [], []
    for text, other in zip(ERASE, GUIDE, strict=True):
        farthest = max(last[text], last[other])  # the published slices, which end at the same distance
        c += list(of[text][last[text] : len(of[text]) - (farthest - last[text])])
        a += list(of[other][last[other] : len(of[other]) - (farthest - last[other])])
    p = [row for text in KEEP for row in of[text]]
    erase = UCE.fit(pipe, ERASE, guide=GUIDE, preserve=KEEP, preserve_scale=0.1, **CALL, **call)
    before = {n: w.detach().clone() for n, w in root.named_parameters()}
    with attach(pipe, erase):
        n, weight = next((n, w) for n, w in root.named_parameters() if kind in n and n.endswith("weight"))
        wanted = published(before[n], c, a, p, s_p=0.1)
        assert (weight.double() - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_transformers_are_given_the_pooled_text_too():
    pipe = families()["flux"].build()
    erase = UCE.fit(pipe, "fox", guide="dog", max_sequence_length=16, **CALL)
    pooled = {text: pipe.encode_prompt(text, text, max_sequence_length=16)[1][0].double() for text in ("fox", "dog")}
    path = "time_text_embed.text_embedder.linear_1"
    before = pipe.transformer.get_submodule(path).weight.detach().clone()
    with attach(pipe, erase):
        found = pipe.transformer.get_submodule(path).weight.detach()
        wanted = published(before, [pooled["fox"]], [pooled["dog"]], []).detach()
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_the_erased_word_draws_what_its_guide_draws_as_the_regularisation_goes_to_nothing():
    """With as many rows as tokens differ, W' reads "fox" as "dog": the keys and values are the guide's."""
    pipe = tiny_sd()
    erase = UCE.fit(pipe, "fox", guide="dog", regularisation=1e-6, tokens="last", **CALL)
    fox, dog = (sd_embeddings(pipe, text)[0].detach() for text in ("fox", "dog"))
    module = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2.to_k"))
    with torch.no_grad():
        wanted = module(dog)
        with attach(pipe, erase):
            assert (module(fox) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_it_is_the_same_from_disk_and_stays_in_its_steps(tmp_path):
    pipe = tiny_sd()

    def draw(*instruments):
        call = {
            "generator": torch.Generator().manual_seed(0),
            "num_inference_steps": 3,
            "output_type": "latent",
            **CALL,
        }
        if not instruments:
            return pipe("a fox", **call).images
        with attach(pipe, *instruments):
            return pipe("a fox", **call).images

    erase = UCE.fit(pipe, "fox", guide="dog", steps=[1], **CALL)
    erase.save(tmp_path / "uce")
    loaded = load_instrument(tmp_path / "uce")
    assert repr(loaded) == repr(erase)
    plain, drawn = draw(), draw(erase)
    assert torch.equal(draw(loaded), drawn)
    assert not torch.equal(plain, drawn)
    whole = UCE(erase.maps)
    assert not torch.equal(draw(whole), drawn)


def test_several_fits_share_what_the_first_read_and_run_no_denoiser(monkeypatch):
    pipe = tiny_sd()
    alone = UCE.fit(pipe, "cat", preserve=["fox", "red b"], **CALL)
    encoded, encode = [], pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda text, *a, **k: encoded.append(text) or encode(text, *a, **k))
    monkeypatch.setattr(pipe.unet, "forward", None)
    texts = TextEmbeddings(pipe, **CALL)
    UCE.fit(pipe, "fox", preserve=["cat", "red b"], texts=texts)
    assert encoded == ["fox", "", "cat", "red b"]
    shared = UCE.fit(pipe, "cat", preserve=["fox", "red b"], texts=texts)
    assert len(encoded) == 4
    assert torch.equal(shared.maps[0].left, alone.maps[0].left)
    assert torch.equal(shared.maps[0].right, alone.maps[0].right)
    for wrong in ({"pipe": tiny_sd()}, {"height": 32}, {"modules": ["unet.mid_block"]}):
        with pytest.raises(ValueError, match="texts= is read with a pipeline"):
            UCE.fit(**{"pipe": pipe, "erase": "fox", "texts": texts, **wrong})


def test_wrong_inputs_are_refused_in_a_sentence():
    pipe = tiny_sd()
    with pytest.raises(ValueError, match="must be a concept"):
        UCE.fit(pipe, " ")
    with pytest.raises(ValueError, match="one for each of the 2"):
        UCE.fit(pipe, ["fox", "cat"], guide=["dog"])
    with pytest.raises(ValueError, match="regularisation=0 must be"):
        UCE.fit(pipe, "fox", regularisation=0)
    with pytest.raises(ValueError, match="is not given the text"):
        UCE.fit(pipe, "fox", modules=["unet.down_blocks.0.attentions.0.proj_in"], **CALL)
    with pytest.raises(ValueError, match="left holds NaN"):
        TextMap(("unet.x",), torch.full((4, 1), float("nan")), torch.ones(1, 4))
    other = UCE(
        [TextMap(("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",), torch.ones(5, 1), torch.ones(1, 5))]
    )
    with pytest.raises(ValueError, match="fitted on another model"):
        attach(pipe, other)
    with pytest.raises(ValueError, match="use 'last' here"):
        UCE.fit(families()["sd3"].build(), "fox", max_sequence_length=12, **CALL)
    peft = pytest.importorskip("peft")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_k"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        UCE.fit(pipe, "fox", **CALL)


def test_by_word_a_concept_is_read_as_the_one_that_takes_its_place():
    pipe = tiny_sd()
    prompts = {"fox": ["a fox", "red fox"], "dog": ["a dog", "red dog"], "cat": ["a cat"]}
    found = erase_by_word(pipe, "fox", "uce", prompts, into="dog", **CALL)
    wanted = UCE.fit(pipe, ["a fox", "red fox"], guide=["a dog", "red dog"], preserve=["a dog", "a cat"], **CALL)
    assert isinstance(found, UCE)
    for one, other in zip(found.maps, wanted.maps, strict=True):
        assert torch.equal(one.left, other.left)
        assert torch.equal(one.right, other.right)
    for method, into in (("sld", "dog"), ("uce", "fox"), ("uce", "owl")):
        with pytest.raises(ValueError, match=f"into='{into}' must be another concept"):
            erase_by_word(pipe, "fox", method, prompts, into=into, **CALL)
