"""OpenAI's `.pt` files: read as the format's description computes them, wrong ones refused, written and read again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, openai
from tests.sae.dense import dense, random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference

CASES = cases("openai")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: Any) -> Path:
    """Replace entries, or take them away (None); two underscores stand for a dot."""
    path = place / "autoencoder.pt"
    state = torch.load(path, weights_only=True)
    for name, value in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if value is not None:
            state[name] = value
    torch.save(state, path)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_format_says(case):
    assert detect(case).name == "openai"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_the_file_may_have_any_name(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    file = (place / "autoencoder.pt").rename(tmp_path / "12.pt")
    assert detect(file).name == "openai"
    assert largest_difference(load_sae(file), FIXTURE["topk"]) < TOLERANCE
    assert load_sae(tmp_path, subfolder="12.pt", hookpoint="unet.mid_block").config.hookpoint == "unet.mid_block"


def test_only_topk_standardises_and_its_function_comes_after_the_selection():
    topk, raw, relu = (load_sae(FIXTURE[name]).config for name in ("topk", "topk_identity", "relu_unnamed"))
    assert (topk.activation, topk.k, topk.normalizer) == ("topk", 4, "standardize")
    assert (raw.activation, raw.k, raw.normalizer) == ("raw_topk", 9, "standardize")
    assert (relu.activation, relu.k, relu.normalizer) == ("relu", None, "b_pre")
    assert (expected(FIXTURE["topk_identity"])["code"] < 0).any()


def test_what_training_counted_is_kept_for_every_latent():
    state = torch.load(FIXTURE["topk"] / "autoencoder.pt", weights_only=True)
    sae = load_sae(FIXTURE["topk"])
    assert torch.equal(sae.statistic("activation_frequency"), state["latents_activation_frequency"])
    assert torch.equal(sae.statistic("mean_square"), state["latents_mean_square"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder__weight": torch.zeros(24)}, r"no encoder\.weight of two dimensions"),
        ({"decoder__weight": None}, r"lacks \['decoder\.weight'\]"),
        ({"decoder__weight": torch.zeros(24, 12)}, r"decoder\.weight .* shape \[24, 12\], \[12, 24\] was expected"),
        ({"pre_bias": torch.full((12,), torch.nan)}, r"b_pre .* NaN or Inf"),
        ({"latent_bias": torch.zeros(24, dtype=torch.int32)}, r"latent_bias .* torch\.int32"),
        ({"latents_mean_square": torch.zeros(23)}, r"latents_mean_square .* shape \[23\], \[24\]"),
        ({"activation": "GELU"}, r"activation .* is 'GELU'"),
        ({"activation_state_dict": None}, r"'TopK' with state None: ReLU, or TopK with its k"),
        ({"activation_state_dict": {"postact_fn": "ReLU"}}, r"lacks 'k'"),
        ({"activation_state_dict": {"k": 99, "postact_fn": "ReLU"}}, r"k is 99 but n_latents is 24"),
        ({"activation_state_dict": {"k": 4, "postact_fn": "GELU"}}, r"postact_fn"),
    ],
)
def test_a_wrong_file_is_refused_in_one_sentence(tmp_path, changes, words):
    path = change(copied(FIXTURE["topk"], tmp_path), **changes)
    with pytest.raises((ValueError, KeyError, TypeError), match=words):
        load_sae(path)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    marker = tmp_path / "was-here"
    path = change(copied(FIXTURE["topk"], tmp_path), extra=Malicious(marker))
    with pytest.raises(ValueError, match=r"could run code when it is opened .* save its weights alone"):
        load_sae(path)
    assert not marker.exists()


def test_a_file_cut_short_and_a_file_of_something_else_are_refused(tmp_path):
    path = copied(FIXTURE["topk"], tmp_path) / "autoencoder.pt"
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"autoencoder\.pt is damaged .*download it again"):
        load_sae(path)
    torch.save({"weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"autoencoder\.pt is no SAE that can be read"):
        load_sae(path)


@pytest.mark.parametrize(
    ("activation", "normalizer"),
    [("relu", "b_pre"), ("relu", "none"), ("topk", "standardize"), ("raw_topk", "standardize")],
)
def test_what_is_written_reads_back_to_the_same_code(tmp_path, activation, normalizer):
    """With `b_pre` and `b_out` that differ, which the format does not have: they are folded into the encoder's bias."""
    sae = random_sae(activation, normalizer=normalizer, statistics=("mean_square",))
    openai.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2))
    code, reconstruction = dense(sae, x)
    again = load_sae(tmp_path)
    assert (again.encode(x).dense() - code).abs().max() < 1e-4
    assert (again(x) - reconstruction).abs().max() < 1e-4
    assert torch.equal(again.statistic("mean_square"), sae.statistic("mean_square"))


@pytest.mark.parametrize("case", ["relu", "topk", "topk_identity"])
def test_a_file_written_again_has_the_same_entries(tmp_path, case):
    sae = load_sae(FIXTURE[case])
    openai.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    theirs, ours = (torch.load(place / "autoencoder.pt", weights_only=True) for place in (FIXTURE[case], tmp_path))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same or name == "stats_last_nonzero", name


@pytest.mark.parametrize(
    ("activation", "normalizer", "more", "words"),
    [
        ("jumprelu", "b_pre", {}, "cannot express activation 'jumprelu'"),
        ("topk", "b_pre", {}, "standardises the rows of every TopK SAE"),
        ("topk", "standardize", {"eps": 1e-3}, "with eps 0.001"),
        ("relu", "standardize", {}, "cannot express normalizer 'standardize' of a ReLU SAE"),
        ("relu", "b_pre", {"skip": True}, "cannot express transcoders and skips"),
    ],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, activation, normalizer, more, words):
    sae = random_sae(activation, normalizer=normalizer, **more)
    with pytest.raises(ValueError, match=words):
        openai.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())
