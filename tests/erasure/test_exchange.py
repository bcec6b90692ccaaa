"""Exchange against its own arithmetic: scores, pairs of positions and least squares written out once more."""

from __future__ import annotations

import pytest
import torch

import sparsefeat as sf
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import load_instrument
from tests.pipeline.instruments import Watch
from tests.tiny import MAX_TOKENS, pixels, tiny_sd

AT = "text_encoder.encoder.layers.0"
D, N, K, F = 32, 64, 6, 5
# "fox" and "cat" are one token each, "dog" is three.
PROMPTS = {"dog": ["a dog b", "dog c"], "fox": ["a fox b", "fox c"], "cat": ["a cat b", "cat c", "cat"]}
# Where each position of the target's two prompts finds its like: begin mark, words, end mark, padding.
INTO_FOX = ([0, 1, 2, 2, 2, 3, 4], [0, 1, 1, 1, 2, 3])
INTO_DOG = ([0, 1, 4, 5, 6], [0, 3, 4, 5])


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def make_sae(**options):
    torch.manual_seed(3)
    config = {"d_model": D, "n_latents": N, "k": K, "hookpoint": AT, **options}
    return SAE(SAEConfig(**config)).requires_grad_(False).eval()


@pytest.fixture(scope="module", params=["none", "unit_norm"])
def sae(request):
    return make_sae(normalizer=request.param)


def rows_of(pipe, prompt):
    tokens = pipe.tokenizer(prompt, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    with torch.no_grad():
        return pipe.text_encoder(tokens.input_ids, output_hidden_states=True).hidden_states[1][0].double()


def dense_code(sae, x):
    scale = x.norm(dim=-1, keepdim=True) if sae.config.normalizer == "unit_norm" else torch.ones(len(x), 1).double()
    pre = (x / scale - sae.b_pre.double()) @ sae.W_enc.double().T + sae.b_enc.double()
    kept = pre.topk(K, -1)
    return torch.zeros_like(pre).scatter_(-1, kept.indices, kept.values.relu()), scale


@pytest.mark.parametrize(("target", "into", "places"), [("dog", "fox", INTO_FOX), ("fox", "dog", INTO_DOG)])
def test_the_decoder_rows_are_the_least_squares_of_paired_positions(pipe, sae, target, into, places):
    made = sf.Exchange.fit(pipe, sae, target, PROMPTS, into=into, n_latents=F)
    rows = {c: [rows_of(pipe, p)[1:] for p in prompts] for c, prompts in PROMPTS.items()}
    mean = {c: dense_code(sae, torch.cat(x))[0] for c, x in rows.items()}
    others = torch.cat([mean[c] for c in PROMPTS if c != target]).mean(0)
    own = mean[target].mean(0)
    latents = (own / own.sum() - others / others.sum()).topk(F).indices.sort().values
    assert made.latents.tolist() == latents.tolist()
    wanted = []
    for mine, its, known in zip(PROMPTS[target], PROMPTS[into], places, strict=True):
        x, y = rows_of(pipe, mine), rows_of(pipe, its)
        longest = max(len(pipe.tokenizer(p).input_ids) for p in (mine, its))
        padding = [max(p, len(pipe.tokenizer(its).input_ids)) for p in range(len(known), MAX_TOKENS)]
        assert longest <= MAX_TOKENS
        wanted.append((y[[*known, *padding]] - x)[1:])

    def values(concept):
        code, scale = dense_code(sae, torch.cat(rows[concept]))
        return (code * scale)[:, latents]

    z = torch.cat([values(target), *(values(c) for c in PROMPTS if c != target)])
    ridge = 1e-4 * (z * z).sum(0).mean()
    held = torch.cat([z, ridge.sqrt() * torch.eye(F).double()])
    aimed = torch.cat([*wanted, torch.zeros(len(held) - sum(map(len, wanted)), D).double()])
    change = torch.linalg.lstsq(held, aimed).solution
    assert (
        made.change.double() - change
    ).abs().max() <= 1e-3 * change.abs().max()  # ridge 1e-4: condition up to 1e4, fp32 in


def test_a_row_moves_by_its_latents_and_only_the_prompts(pipe, sae, tmp_path):
    made = sf.Exchange.fit(pipe, sae, "fox", {**PROMPTS, "cat": ["a cat b", "cat c"]}, into="cat", n_latents=F)
    made.save(tmp_path / "exchange")
    for one in (made, load_instrument(tmp_path / "exchange")):
        before, after = Watch(AT), Watch(AT)
        with attach(pipe, before, one, after):
            pixels(pipe, "a fox b", steps=1, output_type="latent")
        moved = 0
        for said, left in zip(before.rows, after.rows, strict=True):
            x = said.double()
            code, scale = dense_code(sae, x)
            change = (code * scale)[:, made.latents] @ made.change.double()
            if not torch.equal(left, said):
                moved += 1
                assert (left.double() - x - change).abs().max() <= 1e-5 * x.abs().max()
                still = (code[:, made.latents] == 0).all(1)
                assert bool(still.any())
                assert torch.equal(left[still], said[still])
        assert moved == 1  # of the two runs of the encoder, the prompt's and the empty one
    assert made.concepts == ("fox", "cat")
    assert "cat for fox" in repr(made)


def test_the_stand_in_is_the_concept_of_the_most_alike_code(pipe):
    sae = make_sae()
    prompts = {"dog": ["dog"], "cat": ["cat"], "fox": ["fox c"], "again": ["fox c"]}
    assert sf.Exchange.fit(pipe, sae, "fox", prompts, n_latents=F).concepts == ("fox", "again")


def test_what_cannot_be_exchanged_is_refused(pipe):
    sae = make_sae()
    with pytest.raises(ValueError, match="target='owl' must be a key"):
        sf.Exchange.fit(pipe, sae, "owl", PROMPTS)
    with pytest.raises(ValueError, match="into='owl' must be a key"):
        sf.Exchange.fit(pipe, sae, "fox", PROMPTS, into="owl")
    with pytest.raises(ValueError, match="another concept to stand in"):
        sf.Exchange.fit(pipe, sae, "fox", PROMPTS, into="fox")
    with pytest.raises(ValueError, match=r"are 2 and prompts\['cat'\] 3"):
        sf.Exchange.fit(pipe, sae, "fox", PROMPTS, into="cat")
    with pytest.raises(ValueError, match="n_latents"):
        sf.Exchange.fit(pipe, sae, "fox", PROMPTS, n_latents=0)
    with pytest.raises(ValueError, match="no latent is more active"):
        sf.Exchange.fit(pipe, sae, "fox", {"fox": ["fox"], "cat": ["fox"]})
    with pytest.raises(ValueError, match=r"change \[2, 31\]"):
        sf.Exchange(sae, [1, 2], torch.zeros(2, 31))
    with pytest.raises(ValueError, match="different latents"):
        sf.Exchange(sae, [1, 1], torch.zeros(2, 32))
    with pytest.raises(ValueError, match=r"NaN|finite"):
        sf.Exchange(sae, [1], torch.full((1, 32), torch.nan))
