"""Crosscoders: an SAE over the layers side by side that computes the published formulas; what cannot be is refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference, made_by

CASES = cases("crosscoder")
FIXTURE = {case.name: case for case in CASES}


def change(place, **changes):
    state = load_file(place / "model.safetensors")
    for name, tensor in changes.items():
        state.pop(name.replace("__", "."), None)
        if tensor is not None:
            state[name.replace("__", ".")] = tensor
    save_file(state, place / "model.safetensors")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_the_formulas(case):
    place = case / made_by(case).get("file", "")
    assert detect(place).name == "crosscoder"
    sae = load_sae(place)
    assert sae.config.metadata["layers"] == 2
    assert largest_difference(sae, case) < TOLERANCE


def test_a_state_dict_named_like_a_checkpoint_of_dictionary_learning_is_told_apart(tmp_path):
    file = copied(FIXTURE["square_state_dict"], tmp_path) / "ae_final.pt"
    assert detect(file.rename(file.with_name("ae_1000.pt"))).name == "crosscoder"


def test_the_fixtures_have_latents_that_only_the_threshold_keeps_out():
    for name in ("crosscoder", "sae", "mixed", "none"):
        theirs = expected(FIXTURE[name])
        t = load_file(FIXTURE[name] / "model.safetensors")
        x = theirs["x"].view(-1, 2, 6)
        pre = torch.einsum("bld,ldn->bn", x, t["encoder.weight"]) + t["encoder.bias"]
        assert ((pre > 0) & (theirs["code"] == 0)).any()


def test_an_encoder_of_fewer_layers_leaves_the_others_unread(tmp_path):
    place = copied(FIXTURE["relu"], tmp_path)
    encoder = load_file(place / "model.safetensors")["encoder.weight"]
    change(place, encoder__weight=encoder[1:].clone())
    described = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(described | {"encoder_layers": [1]}))
    W_enc = load_sae(place).W_enc.view(20, 2, 6)
    assert not W_enc[:, 0].any()
    assert torch.equal(W_enc[:, 1], encoder[1].T)


def test_a_latent_without_a_decoder_is_never_active(tmp_path):
    place = copied(FIXTURE["crosscoder"], tmp_path)
    decoder = load_file(place / "model.safetensors")["decoder.weight"]
    decoder[:, 3] = 0
    change(place, decoder__weight=decoder, encoder__bias=torch.full((20,), 1e6), threshold=torch.tensor(0.0))
    active = load_sae(place).encode(expected(FIXTURE["crosscoder"])["x"]).dense() > 0
    assert not active[:, 3].any()
    assert active[:, :3].all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder__bias": None}, r"lacks \['decoder\.bias'\]"),
        ({"decoder__weight": torch.zeros(2, 6, 20)}, r"shape"),
        ({"encoder__bias": torch.full((20,), torch.inf)}, r"b_enc .* NaN or Inf"),
        ({"threshold": torch.tensor(-1.0)}, r"threshold .* -1\.0, unset"),
        ({"code_normalization_id": torch.tensor(5)}, r"code_normalization_id .* is 5: crosscoders whose layers share"),
        ({"activation_std": torch.ones(6)}, r"activation_std .* shape \[6\], \[2, 6\] was expected"),
        ({"k": torch.tensor(4.5)}, r"k in .* a whole number was expected"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(tmp_path, changes, words):
    place = copied(FIXTURE["normalized"], tmp_path)
    change(place, **changes)
    with pytest.raises(ValueError, match=words):
        load_sae(place)


def test_a_file_cut_short_is_not_taken_for_a_crosscoder(tmp_path):
    place = copied(FIXTURE["relu"], tmp_path)
    path = place / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises((ValueError, FileNotFoundError), match=r"model\.safetensors"):
        load_sae(place)
