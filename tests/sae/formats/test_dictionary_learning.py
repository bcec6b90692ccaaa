"""dictionary_learning: its own files read as it computes them, wrong ones are refused, and what we write it can hold."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, dictionary_learning
from tests.sae.dense import dense, random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference

CASES = cases("dictionary_learning")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: torch.Tensor | None) -> None:
    state = torch.load(place / "ae.pt", weights_only=True)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save(state, place / "ae.pt")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_library_computes(case):
    assert detect(case).name == "dictionary_learning"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_what_the_files_say_of_the_model_is_kept():
    config = load_sae(FIXTURE["matryoshka"]).config
    assert (config.base_model, config.k, config.inference) == ("EleutherAI/pythia-70m-deduped", 4, "threshold")
    assert config.metadata["group_sizes"] == [8, 16]
    assert config.metadata["submodule_name"] == "resid_post_layer_8"


def test_a_checkpoint_of_a_run_takes_the_config_one_folder_up(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    (place / "checkpoints").mkdir()
    (place / "ae.pt").rename(place / "checkpoints" / "ae_500.pt")
    sae = load_sae(place / "checkpoints" / "ae_500.pt")
    assert largest_difference(sae, FIXTURE["topk"]) < TOLERANCE


def test_a_backup_of_a_run_without_a_norm_factor_is_not_scaled(tmp_path):
    place = copied(FIXTURE["backup"], tmp_path)
    state = torch.load(place / "ae.pt", weights_only=True)
    torch.save(state | {"norm_factor": None}, place / "ae.pt")
    assert torch.equal(load_sae(place).b_enc, state["ae"]["encoder.bias"])
    assert torch.equal(load_sae(FIXTURE["backup"]).b_enc, state["ae"]["encoder.bias"] * 2.5)


def test_a_file_of_before_k_and_threshold_were_stored_takes_k_from_the_config(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    change(place, k=None, threshold=None)
    assert largest_difference(load_sae(place), FIXTURE["topk"]) < TOLERANCE


def test_a_k_in_the_config_that_is_not_the_weights_is_told_and_a_given_one_is_used(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    described = json.loads((place / "config.json").read_text())
    own = described["trainer"]["k"]
    described["trainer"]["k"] = own + 3
    (place / "config.json").write_text(json.dumps(described))
    with pytest.warns(UserWarning, match=rf"k is {own} here and {own + 3} in .*config\.json; .* pass k="):
        assert largest_difference(load_sae(place), FIXTURE["topk"]) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_sae(place, k=own + 3).config.k == own + 3
        load_sae(FIXTURE["topk"])


def test_a_threshold_that_is_unset_means_top_k(tmp_path):
    place = copied(FIXTURE["batch_topk"], tmp_path)
    change(place, threshold=torch.tensor(-1.0))
    sae = load_sae(place)
    assert sae.config.inference == "topk"
    x = expected(FIXTURE["batch_topk"])["x"]
    assert torch.equal((sae.encode(x).dense() > 0).sum(1), torch.full((7,), 4))


def test_a_gated_sae_with_a_negative_threshold_is_active_only_where_the_gate_is_open(tmp_path):
    """Fixture and code agree on rows where gate and magnitude disagree: both kinds must occur for the test to count."""
    state = torch.load(FIXTURE["gated"] / "ae.pt", weights_only=True)
    theirs = expected(FIXTURE["gated"])
    x = theirs["x"] - state["decoder_bias"]
    gate = x @ state["encoder.weight"].T + state["gate_bias"] > 0
    magnitude = state["r_mag"].exp() * (x @ state["encoder.weight"].T) + state["mag_bias"] > 0
    assert (gate & ~magnitude).any()
    assert (magnitude & ~gate).any()
    assert torch.equal(load_sae(FIXTURE["gated"]).encode(theirs["x"]).dense() > 0, gate & magnitude)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("topk", {"decoder__weight": None}, r"lacks \['decoder\.weight'\]"),
        ("topk", {"decoder__weight": torch.zeros(24, 10)}, r"decoder\.weight .* shape \[24, 10\], \[10, 24\] was"),
        ("topk", {"encoder__weight": None}, r"no encoder\.weight or W_enc"),
        ("topk", {"k": torch.tensor(2.5)}, r"k in .* a whole number was expected"),
        ("topk", {"k": torch.tensor(99)}, r"k is 99 but n_latents is 24"),
        ("topk", {"b_dec": torch.full((10,), torch.nan)}, r"b_pre .* NaN or Inf"),
        ("topk", {"b_dec": torch.zeros(10, dtype=torch.int32)}, r"b_dec .* torch\.int32: a floating tensor"),
        ("batch_topk", {"threshold": None}, r"lacks \['threshold'\]"),
        ("matryoshka", {"W_dec": torch.zeros(10, 24)}, r"W_dec .* shape \[10, 24\], \[24, 10\] was"),
        ("gated", {"r_mag": torch.full((24,), 1e4)}, r"NaN or Inf"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, case, changes, words):
    place = copied(FIXTURE[case], tmp_path)
    change(place, **changes)
    with pytest.raises(ValueError, match=words):
        load_sae(place)


def test_a_class_that_is_not_known_or_not_named_is_refused(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    (place / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    with pytest.raises(ValueError, match=r"dict_class .* is 'IdentityDict': it must be one of AutoEncoderTopK"):
        load_sae(place)
    (place / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_sae(place)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/sparsefeat-was-here",)


@pytest.mark.parametrize("kind", ["pickle", "cut short"])
def test_a_pickle_that_would_run_code_and_a_file_cut_short_are_refused(tmp_path, kind):
    place = copied(FIXTURE["topk"], tmp_path)
    if kind == "pickle":
        torch.save(torch.load(place / "ae.pt", weights_only=True) | {"extra": Malicious()}, place / "ae.pt")
    else:
        (place / "ae.pt").write_bytes((place / "ae.pt").read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"could run code|is damaged"):
        load_sae(place)
    assert not Path("/tmp/sparsefeat-was-here").exists()


@pytest.mark.parametrize(
    ("activation", "inference", "normalizer"),
    [
        ("topk", "topk", "b_pre"),
        ("topk", "topk", "none"),
        ("batch_topk", "threshold", "b_pre"),
        ("jumprelu", "topk", "b_pre"),
        ("relu", "topk", "b_pre"),
    ],
)
def test_what_is_written_reads_back_to_the_same_code(tmp_path, activation, inference, normalizer):
    """With `b_pre` and `b_out` that differ, which the format does not have: they are folded into the encoder's bias."""
    sae = random_sae(activation, inference, normalizer)
    dictionary_learning.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2))
    code, reconstruction = dense(sae, x)
    again = load_sae(tmp_path)
    assert (again.encode(x).dense() - code).abs().max() < 1e-4
    assert (again(x) - reconstruction).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("activation", "normalizer", "words"),
    [("signed_topk", "b_pre", "activation 'signed_topk'"), ("topk", "standardize", "normalizer 'standardize'")],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, activation, normalizer, words):
    sae = random_sae(activation, normalizer=normalizer)
    with pytest.raises(ValueError, match=f"cannot express {words}"):
        dictionary_learning.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())


def test_a_pickled_module_is_refused_without_the_advice_to_trust_it(tmp_path):
    place = copied(CASES[0], tmp_path)
    torch.save(torch.nn.Linear(2, 2), place / "ae.pt")
    with pytest.raises(
        ValueError, match=r"GLOBAL torch.nn.modules.linear.Linear\): in the program that wrote it"
    ) as said:
        load_sae(place)
    assert "add_safe_globals" not in str(said.value)
