"""sdxl-unbox, Concept Steerers, ItD: read as the format's description computes them, refused, written and read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, unbox
from tests.sae.dense import dense, random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, largest_difference

CASES = cases("unbox")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or take them away (None); two underscores stand for a dot."""
    state = torch.load(place / "state_dict.pth", weights_only=True)["state_dict"]
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    torch.save({"state_dict": state}, place / "state_dict.pth")


def reconfigure(place: Path, **changes: Any) -> None:
    """Replace keys of the config, or take them away (None)."""
    values = json.loads((place / "config.json").read_text()) | changes
    (place / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_format_says(case):
    assert detect(case).name == "unbox"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_a_decoder_that_lies_column_by_column_is_not_taken_for_its_transpose():
    """In the square case no shape gives a wrong orientation away."""
    stored = torch.load(FIXTURE["square"] / "state_dict.pth", weights_only=True)["state_dict"]["decoder.weight"]
    assert not stored.is_contiguous()
    sae = load_sae(FIXTURE["square"])
    assert torch.equal(sae.W_dec, stored.T)
    assert sae.W_dec.is_contiguous()


def test_mean_and_deviation_become_statistics_and_a_latent_never_active_has_zero(tmp_path):
    place = copied(FIXTURE["sdxl_unbox"], tmp_path)
    mean = torch.load(place / "mean.pt", weights_only=True)
    sae = load_sae(place)
    assert torch.equal(sae.statistic("mean_nonzero"), mean)
    assert torch.equal(sae.statistic("std_nonzero"), torch.load(place / "std.pt", weights_only=True))
    mean[5] = torch.nan
    torch.save(mean, place / "mean.pt")
    (place / "std.pt").unlink()
    sae = load_sae(place)
    assert sae.config.statistics == ("mean_nonzero",)
    assert sae.statistic("mean_nonzero")[5] == 0
    torch.save(mean[:-1], place / "mean.pt")
    with pytest.raises(ValueError, match=r"mean\.pt .* shape \[23\], \[24\] was expected"):
        load_sae(place)


@pytest.mark.parametrize(
    ("folder", "hookpoint"),
    [
        (
            "unet.down_blocks.2.attentions.1_k10_hidden5120_auxk256_bs4096_lr0.0001/final",
            "unet.down_blocks.2.attentions.1:diff",
        ),
        (
            "text_encoder.text_model.encoder.layers.9_k32_hidden3072_auxk32_bs4096_lr0.0004_2024/final",
            "text_encoder.text_model.encoder.layers.9",
        ),
        ("text_model.encoder.layers.8_k64_hidden524288_auxk256_bs50_lr0.0001/6000", "text_model.encoder.layers.8"),
        ("my_sae/final", None),
    ],
)
def test_the_published_folders_name_the_hookpoint(tmp_path, folder, hookpoint):
    (tmp_path / folder).parent.mkdir(parents=True)
    copied(FIXTURE["square"], tmp_path).rename(tmp_path / folder)
    assert load_sae(tmp_path / folder).config.hookpoint == hookpoint


def test_concept_steerers_are_told_apart_by_what_they_were_trained_against():
    assert load_sae(FIXTURE["steerers"]).config.metadata["trained_against"] == "x - b_pre"
    assert "trained_against" not in load_sae(FIXTURE["sdxl_unbox"]).config.metadata


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder__weight": None}, r"lacks \['encoder\.weight'\]"),
        ({"decoder__weight": torch.zeros(24, 12)}, r"decoder\.weight .* shape \[24, 12\], \[12, 24\] was expected"),
        ({"pre_bias": torch.full((12,), torch.nan)}, r"b_pre .* NaN or Inf"),
        ({"latent_bias": torch.zeros(24, dtype=torch.int32)}, r"latent_bias .* torch\.int32"),
    ],
)
def test_wrong_weights_are_refused_in_one_sentence(tmp_path, changes, words):
    place = copied(FIXTURE["sdxl_unbox"], tmp_path)
    change(place, **changes)
    with pytest.raises((ValueError, KeyError, TypeError), match=words):
        load_sae(place)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_dirs_local": None}, r"config\.json lacks 'n_dirs_local'"),
        ({"n_dirs_local": 20}, r"shape \[24, 12\], \[20, 12\] was expected"),
        ({"d_model": "12"}, r"d_model in .* is '12': a whole number"),
        ({"k": 0}, r"k in .* is 0: a whole number of at least 1"),
        ({"k": 99}, r"config\.json: k is 99 but n_latents is 24"),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(tmp_path, changes, words):
    place = copied(FIXTURE["sdxl_unbox"], tmp_path)
    reconfigure(place, **changes)
    with pytest.raises((ValueError, KeyError), match=words):
        load_sae(place)


class Malicious:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("file", ["state_dict.pth", "mean.pt"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run_it(tmp_path, file):
    place, marker = copied(FIXTURE["sdxl_unbox"], tmp_path), tmp_path / "was-here"
    torch.save({"state_dict": Malicious(marker)}, place / file)
    with pytest.raises(ValueError, match=rf"{file} is a pickle that could run code .* save its weights alone"):
        load_sae(place)
    assert not marker.exists()


def test_missing_and_damaged_files_are_refused(tmp_path):
    place = copied(FIXTURE["sdxl_unbox"], tmp_path)
    weights = place / "state_dict.pth"
    with pytest.raises(NotADirectoryError, match="pass the folder it lies in"):
        load_sae(weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-300])
    with pytest.raises(ValueError, match=r"state_dict\.pth is damaged"):
        load_sae(place)
    torch.save([torch.zeros(3)], weights)
    with pytest.raises(ValueError, match=r"holds a list: a state dict was expected"):
        load_sae(place)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"state_dict\.pth is missing"):
        load_sae(place)
    weights.write_bytes(whole)
    (place / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_sae(place)


@pytest.mark.parametrize("normalizer", ["b_pre", "none"])
def test_what_is_written_reads_back_to_the_same_code(tmp_path, normalizer):
    """With `b_pre` and `b_out` that differ, which the format does not have: they are folded into the encoder's bias."""
    sae = random_sae("topk", normalizer=normalizer, statistics=("mean_nonzero", "std_nonzero"))
    unbox.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2))
    code, reconstruction = dense(sae, x)
    again = load_sae(tmp_path)
    assert (again.encode(x).dense() - code).abs().max() < 1e-4
    assert (again(x) - reconstruction).abs().max() < 1e-4
    for name in sae.config.statistics:
        assert torch.equal(again.statistic(name), sae.statistic(name))


OWN = [case for case in CASES if (case / "state_dict.pth").exists()]  # SAEmnesia's mixture is not written


@pytest.mark.parametrize("case", OWN, ids=lambda case: case.name)
def test_a_folder_written_again_holds_the_same(tmp_path, case):
    sae = load_sae(case)
    unbox.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    theirs, ours = (torch.load(place / "state_dict.pth", weights_only=True)["state_dict"] for place in (case, tmp_path))
    assert theirs.keys() == ours.keys()
    assert theirs["decoder.weight"].stride() == ours["decoder.weight"].stride()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if name != "stats_last_nonzero")
    theirs_config, config = (json.loads((place / "config.json").read_text()) for place in (case, tmp_path))
    assert config == theirs_config
    assert (case / "mean.pt").exists() == (tmp_path / "mean.pt").exists()


@pytest.mark.parametrize(
    ("activation", "normalizer", "more", "words"),
    [
        ("jumprelu", "b_pre", {}, "cannot express activation 'jumprelu'"),
        ("topk", "standardize", {}, "cannot express normalizer 'standardize'"),
        ("topk", "b_pre", {"skip": True}, "cannot express a skip"),
        ("topk", "none", {"transcoder": True}, "cannot express a transcoder"),
    ],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, activation, normalizer, more, words):
    sae = random_sae(activation, normalizer=normalizer, **more)
    with pytest.raises(ValueError, match=words):
        unbox.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())
