"""sparsify and SAeUron: their files read as they compute them, wrong ones are refused, what we write they can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, sparsify
from tests.sae.dense import dense, random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference

CASES = cases("sparsify")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or take them away; two underscores stand for a dot."""
    state = load_file(place / "sae.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, place / "sae.safetensors")


def reconfigure(place: Path, **changes: Any) -> None:
    """Replace keys of the config, or take them away (None)."""
    values = json.loads((place / "cfg.json").read_text()) | changes
    (place / "cfg.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_library_computes(case):
    assert detect(case).name == "sparsify"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_num_latents_zero_stands_for_the_expansion_and_old_files_without_activation_are_topk(tmp_path):
    assert json.loads((FIXTURE["topk"] / "cfg.json").read_text())["num_latents"] == 0
    assert load_sae(FIXTURE["topk"]).n_latents == 24
    place = copied(FIXTURE["topk"], tmp_path)
    reconfigure(place, activation=None, num_latents=None, transcode=None, skip_connection=None)
    assert largest_difference(load_sae(place), FIXTURE["topk"]) < TOLERANCE


def test_what_another_librarys_loader_makes_of_these_files_is_not_what_ours_does():
    """sae-lens turns the decoder round and leaves out the bias: its answer is far off, ours is the writer's."""
    case = FIXTURE["square"]
    right, wrong = expected(case), load_file(case / "sae_lens.safetensors")
    assert (wrong["reconstruction"] - right["reconstruction"]).abs().max() > 1
    assert (wrong["code"] - right["code"]).abs().max() > 0.1
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_hookpoint_and_model_come_from_the_runs_folders(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    place = copied(FIXTURE["topk"], run).rename(run / "transformer.layers.3")
    (run / "config.json").write_text(json.dumps({"model": "tiny/model", "ctx_len": 64}))
    config = load_sae(place).config
    assert (config.hookpoint, config.base_model) == ("transformer.layers.3", "tiny/model")
    with pytest.warns(
        UserWarning, match=r"state hookpoint 'transformer\.layers\.3', and 'unet\.mid_block:diff' was given"
    ):
        other = load_sae(run, subfolder="transformer.layers.3", hookpoint="unet.mid_block:diff")
    assert other.config.hookpoint == "unet.mid_block:diff"
    (place / "seed1").mkdir()
    for name in ("cfg.json", "sae.safetensors"):
        (place / name).rename(place / "seed1" / name)
    assert load_sae(place / "seed1").config.hookpoint == "transformer.layers.3"
    (run / "config.json").write_text("not a config of theirs")
    assert load_sae(place / "seed1").config.base_model is None
    assert load_sae(FIXTURE["topk"]).config.hookpoint is None  # a folder of any other name says nothing


def test_a_runs_folder_names_the_saes_below_it(tmp_path):
    for hookpoint in ("layers.3", "layers.4"):
        copied(FIXTURE["topk"], tmp_path).rename(tmp_path / hookpoint)
    with pytest.raises(FileNotFoundError, match=r"holds 2 SAEs in folders below it: .* subfolder='layers\.3'"):
        load_sae(tmp_path)
    assert load_sae(tmp_path, subfolder="layers.4").config.hookpoint == "layers.4"


def test_saeurons_batch_topk_selects_over_the_batch_only_in_training():
    sae = load_sae(FIXTURE["saeuron"])
    assert (sae.config.activation, sae.config.inference, sae.config.k) == ("batch_topk", "topk", 4)
    x = expected(FIXTURE["saeuron"])["x"]
    pre = (x - sae.b_pre) @ sae.W_enc.T + sae.b_enc
    largest = pre.relu().flatten().topk(4 * len(x)).values
    assert torch.allclose(sae.train().encode(x).dense().sum(), largest.sum())


def test_transcoders_map_input_to_output_and_keep_their_skip():
    plain, skip = load_sae(FIXTURE["transcode"]), load_sae(FIXTURE["skip_transcode"])
    assert (plain.config.transcoder, plain.config.skip, plain.config.normalizer) == (True, False, "none")
    assert (skip.config.transcoder, skip.config.skip) == (True, True)
    assert torch.equal(skip.W_skip, load_file(FIXTURE["skip_transcode"] / "sae.safetensors")["W_skip"])


def test_k_of_the_caller_takes_the_place_of_the_files():
    assert load_sae(FIXTURE["topk"], k=7).config.k == 7


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("topk", {"W_dec": None}, r"lacks \['W_dec'\]"),
        ("topk", {"W_dec": torch.zeros(12, 24)}, r"W_dec .* shape \[12, 24\], \[24, 12\] was expected"),
        ("topk", {"encoder__weight": torch.zeros(12, 24)}, r"encoder\.weight .* shape \[12, 24\]"),
        ("topk", {"b_dec": torch.full((12,), torch.nan)}, r"b_pre .* NaN or Inf"),
        ("topk", {"encoder__bias": torch.zeros(24, dtype=torch.int32)}, r"encoder\.bias .* torch\.int32"),
        ("skip", {"W_skip": None}, r"lacks \['W_skip'\]"),
        ("topk", {"W_skip": torch.zeros(12, 12)}, r"W_skip but skip_connection .* is not true"),
    ],
)
def test_wrong_weights_are_refused_in_one_sentence(tmp_path, case, changes, words):
    place = copied(FIXTURE[case], tmp_path)
    change(place, **changes)
    with pytest.raises((ValueError, KeyError, TypeError), match=words):
        load_sae(place)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"d_in": None}, r"cfg\.json lacks 'd_in'"),
        ({"d_in": 13}, r"shape \[24, 12\], \[26, 13\] was expected"),
        ({"d_in": "12"}, r"d_in in .* is '12': a whole number"),
        ({"k": None}, r"cfg\.json lacks 'k'"),
        ({"k": 99}, r"cfg\.json: k is 99 but n_latents is 24"),
        ({"num_latents": -3}, r"num_latents in .* is -3: a whole number of at least 0"),
        ({"expansion_factor": None}, r"lacks 'expansion_factor'"),
        ({"activation": "jumprelu"}, r"activation in .* is 'jumprelu': topk and groupmax"),
        ({"activation": "groupmax", "signed": True}, r"only one may be"),
        ({"activation": "groupmax", "k": 7}, r"k is 7 but n_latents is 24: groupmax needs k equal groups"),
        ({"transcode": "yes"}, r"transcode in .* is 'yes': true or false"),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(tmp_path, changes, words):
    place = copied(FIXTURE["topk"], tmp_path)
    reconfigure(place, **changes)
    with pytest.raises((ValueError, KeyError), match=words):
        load_sae(place)


def test_missing_and_damaged_files_are_refused(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    whole = (place / "sae.safetensors").read_bytes()
    (place / "sae.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"sae\.safetensors is cut short"):
        load_sae(place)
    (place / "sae.safetensors").write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        load_sae(place)
    (place / "sae.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"sae\.safetensors is missing"):
        load_sae(place)
    (place / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"cfg\.json is not valid JSON"):
        load_sae(place)


@pytest.mark.parametrize(
    ("activation", "normalizer", "more"),
    [
        ("topk", "b_pre", {}),
        ("topk", "none", {}),
        ("groupmax", "b_pre", {}),
        ("topk", "b_pre", {"skip": True}),
        ("topk", "none", {"transcoder": True, "skip": True}),
        ("topk", "b_pre", {"transcoder": True}),
    ],
)
def test_what_is_written_reads_back_to_the_same_code(tmp_path, activation, normalizer, more):
    """With `b_pre` and `b_out` that differ, which the format does not have: they are folded into the encoder's bias."""
    sae = random_sae(activation, normalizer=normalizer, **more)
    sparsify.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2))
    code, reconstruction = dense(sae, x)
    again = load_sae(tmp_path)
    assert detect(tmp_path).name == "sparsify"
    assert (again.config.transcoder, again.config.skip) == (sae.config.transcoder, sae.config.skip)
    assert (again.encode(x).dense() - code).abs().max() < 1e-4
    assert (again(x) - reconstruction).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["topk", "square", "groupmax", "skip_transcode"])
def test_a_file_written_again_holds_the_same_tensors(tmp_path, case):
    sae = load_sae(FIXTURE[case])
    sparsify.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    theirs, ours = (load_file(place / "sae.safetensors") for place in (FIXTURE[case], tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    written = json.loads((tmp_path / "cfg.json").read_text())
    assert written == json.loads((FIXTURE[case] / "cfg.json").read_text()) | {"num_latents": sae.n_latents}


@pytest.mark.parametrize(
    ("activation", "normalizer", "words"),
    [
        ("signed_topk", "b_pre", "cannot express activation 'signed_topk'"),
        ("batch_topk", "b_pre", "cannot express activation 'batch_topk'"),
        ("relu", "b_pre", "cannot express activation 'relu'"),
        ("topk", "standardize", "cannot express normalizer 'standardize', which the package would ignore"),
    ],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, activation, normalizer, words):
    sae = random_sae(activation, normalizer=normalizer)
    with pytest.raises(ValueError, match=words):
        sparsify.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())


def test_a_missing_k_is_asked_for_and_taken_from_the_caller(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    reconfigure(place, k=None)
    with pytest.raises(ValueError, match=r"lacks 'k' .*: pass the k of training, load_sae\(…, k=\)"):
        load_sae(place)
    assert load_sae(place, k=3).config.k == 3
