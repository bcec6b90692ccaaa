"""SAELens: its own files read as it computes them, wrong ones are refused, and what we write it can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect, sae_lens
from tests.sae.dense import dense, random_sae
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference

CASES = cases("sae_lens")
FIXTURE = {case.name: case for case in CASES}


def change(place: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors, or take them away (None)."""
    state = load_file(place / "sae_weights.safetensors")
    for name, tensor in changes.items():
        state.pop(name, None)
        if tensor is not None:
            state[name] = tensor
    save_file(state, place / "sae_weights.safetensors")


def reconfigure(place: Path, **changes: Any) -> None:
    """Replace keys of the config, or take them away (None)."""
    values = json.loads((place / "cfg.json").read_text()) | changes
    (place / "cfg.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_code_and_reconstruction_are_what_the_library_computes(case):
    assert detect(case).name == "sae_lens"
    assert largest_difference(load_sae(case), case) < TOLERANCE


def test_what_the_files_say_of_the_model_is_kept():
    config = load_sae(FIXTURE["matryoshka"]).config
    assert (config.hookpoint, config.base_model) == ("unet.mid_block.attentions.0", "tiny/pipeline")
    assert config.metadata["training_architecture"] == "matryoshka_batchtopk"
    assert config.metadata["training_architecture_details"]["matryoshka_widths"] == [8, 24]
    before = load_sae(FIXTURE["before_6"]).config  # where all keys lie side by side
    assert (before.activation, before.k) == ("topk", 5)
    assert (before.hookpoint, before.base_model) == ("unet.mid_block.attentions.0", "tiny/pipeline")


def test_a_gated_sae_is_active_exactly_where_its_gate_is_open():
    """The rows must have latents where gate and magnitude disagree, both ways, for this to count."""
    case = FIXTURE["gated"]
    t, x = load_file(case / "sae_weights.safetensors"), expected(case)["x"]
    inner = (x - t["b_dec"]) @ t["W_enc"]
    gate, magnitude = inner + t["b_gate"] > 0, t["r_mag"].exp() * inner + t["b_mag"] > 0
    assert (gate & ~magnitude).any()
    assert (magnitude & ~gate).any()
    assert torch.equal(load_sae(case).encode(x).dense() > 0, gate & magnitude)


@pytest.mark.parametrize("case", ["gated", "topk_rescaled", "unfolded_scale", "log_threshold"])
def test_weights_in_half_precision_are_folded_in_single(tmp_path, case):
    """The SAE of the bf16 file is the one of the same numbers in float32, not of their folded values in bf16 again."""
    half, single = copied(FIXTURE[case], tmp_path / "half"), copied(FIXTURE[case], tmp_path / "single")
    state = {name: t.bfloat16() for name, t in load_file(half / "sae_weights.safetensors").items()}
    save_file(state, half / "sae_weights.safetensors")
    save_file({name: t.float() for name, t in state.items()}, single / "sae_weights.safetensors")
    ours, same = load_sae(half).state_dict(), load_sae(single).state_dict()
    assert all(torch.equal(ours[name], same[name]) for name in same)


def test_norms_of_the_decoder_decide_which_latents_are_selected(tmp_path):
    case = FIXTURE["topk_rescaled"]
    place = copied(case, tmp_path)
    reconfigure(place, rescale_acts_by_decoder_norm=False)
    x, code = expected(case)["x"], expected(case)["code"]
    assert not torch.equal(load_sae(place).encode(x).dense() > 0, code > 0)
    assert torch.equal(load_sae(case).encode(x).dense() > 0, code > 0)
    norms = load_sae(case).W_dec.norm(dim=1)
    assert torch.allclose(norms, torch.ones(24))


def test_a_latent_whose_decoder_row_is_zero_stays_silent(tmp_path):
    place = copied(FIXTURE["topk_rescaled"], tmp_path)
    W_dec = load_file(place / "sae_weights.safetensors")["W_dec"]
    change(place, W_dec=W_dec.index_fill(0, torch.tensor([3]), 0))
    x = expected(FIXTURE["topk_rescaled"])["x"]
    assert not load_sae(place).encode(x).dense()[:, 3].any()


def test_a_bias_is_subtracted_by_default_and_after_the_normaliser(tmp_path):
    place = copied(FIXTURE["standard"], tmp_path)
    reconfigure(place, apply_b_dec_to_input=None)
    assert largest_difference(load_sae(place), FIXTURE["standard"]) < TOLERANCE
    normalised = load_sae(FIXTURE["topk_layer_norm"])
    assert normalised.config.normalizer == "standardize"
    assert torch.equal(normalised.b_pre, normalised.b_out)
    assert not load_sae(FIXTURE["standard_square"]).b_pre.any()


def test_the_density_of_latents_is_read_and_a_dead_ones_is_finite(tmp_path):
    place = copied(FIXTURE["sparsity"], tmp_path)
    density = load_file(place / "sparsity.safetensors")["sparsity"]
    assert torch.equal(load_sae(place).statistic("log10_density"), density)
    density[2] = -torch.inf
    save_file({"sparsity": density}, place / "sparsity.safetensors")
    assert load_sae(place).statistic("log10_density")[2] == -10


def test_a_scale_that_is_not_folded_must_be_known(tmp_path):
    place = copied(FIXTURE["unfolded_scale"], tmp_path)
    (place / "activation_scaler.json").write_text(json.dumps({"scaling_factor": None}))
    with pytest.raises(ValueError, match=r"scaling_factor in .* is None: a positive number"):
        load_sae(place)
    (place / "activation_scaler.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected_average_only_in but there is no activation_scaler\.json"):
        load_sae(place)


def test_a_finetuned_scale_of_the_code_goes_into_the_decoder(tmp_path):
    """Of SAELens before 6, whose decoder was given `code * scaling_factor`."""
    case = FIXTURE["before_6"]
    place = copied(case, tmp_path)
    change(place, scaling_factor=torch.ones(24))
    assert largest_difference(load_sae(place), case) < TOLERANCE
    scale = torch.linspace(0.5, 2, 24)
    change(place, scaling_factor=scale)
    with pytest.raises(ValueError, match=r"scaling_factor but finetuning_scaling_factor .* is not true"):
        load_sae(place)
    reconfigure(place, finetuning_scaling_factor=True)
    t, theirs = load_file(place / "sae_weights.safetensors"), expected(case)
    sae = load_sae(place)
    assert torch.allclose(sae.encode(theirs["x"]).dense(), theirs["code"], atol=1e-5)
    assert torch.allclose(sae(theirs["x"]), (theirs["code"] * scale) @ t["W_dec"] + t["b_dec"], atol=1e-5)


@pytest.mark.parametrize("architecture", ["temporal", "matching_pursuit", "something_new"])
def test_architectures_that_are_something_else_are_refused_by_name(tmp_path, architecture):
    place = copied(FIXTURE["standard"], tmp_path)
    reconfigure(place, architecture=architecture)
    with pytest.raises(ValueError, match=f"architecture in .* is '{architecture}', which is no encoder, selection"):
        load_sae(place)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("topk", {"W_dec": None}, r"lacks \['W_dec'\]"),
        ("topk", {"W_dec": torch.zeros(12, 24)}, r"W_dec .* shape \[12, 24\], \[24, 12\] was expected"),
        ("topk", {"W_enc": torch.zeros(24, 12)}, r"W_enc .* shape \[24, 12\], \[12, 24\] was expected"),
        ("topk", {"b_enc": torch.full((24,), torch.inf)}, r"b_enc .* NaN or Inf"),
        ("topk", {"b_dec": torch.zeros(12, dtype=torch.int64)}, r"b_dec .* torch\.int64"),
        ("jumprelu", {"threshold": None}, r"lacks \['threshold'\]"),
        ("log_threshold", {"log_threshold": torch.full((20,), 1e4)}, r"threshold .* NaN or Inf"),
        ("gated", {"b_gate": None}, r"lacks \['b_gate'\]"),
        ("gated", {"r_mag": torch.full((20,), 1e4)}, r"NaN or Inf"),
        ("skip_transcoder", {"W_skip": None}, r"lacks \['W_skip'\]"),
        ("batchtopk_checkpoint", {"topk_threshold": torch.tensor(-1.0)}, r"threshold .* is negative, unset"),
    ],
)
def test_wrong_weights_are_refused_in_one_sentence(tmp_path, case, changes, words):
    place = copied(FIXTURE[case], tmp_path)
    change(place, **changes)
    with pytest.raises((ValueError, KeyError, TypeError), match=words):
        load_sae(place)


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("topk", {"d_sae": None}, r"cfg\.json lacks 'd_sae'"),
        ("topk", {"d_in": 12.5}, r"d_in in .* is 12\.5: a whole number"),
        ("topk", {"k": None}, r"cfg\.json lacks 'k'"),
        ("topk", {"architecture": None}, r"cfg\.json gives k and no architecture"),
        ("topk", {"k": 99}, r"cfg\.json: k is 99 but n_latents is 24"),
        (
            "topk",
            {"normalize_activations": "covariance_whitening"},
            r"'covariance_whitening', which is not read for 'topk'",
        ),
        ("transcoder", {"normalize_activations": "layer_norm"}, r"'layer_norm', which is not read for 'transcoder'"),
        ("transcoder", {"normalize_activations": "expected_average_only_in"}, r"which is not read for 'transcoder'"),
        ("topk", {"architecture": ["topk"]}, r"architecture in .* is \['topk'\], which is no encoder"),
        ("transcoder", {"d_out": 16}, r"d_out in .* is 16 and d_in 12"),
        ("before_6", {"activation_fn_str": "tanh-relu"}, r"activation function in .* is 'tanh-relu': relu and topk"),
        ("topk", {"apply_b_dec_to_input": "no"}, r"apply_b_dec_to_input in .* is 'no': true or false"),
    ],
)
def test_a_wrong_config_is_refused_in_one_sentence(tmp_path, case, changes, words):
    place = copied(FIXTURE[case], tmp_path)
    reconfigure(place, **changes)
    with pytest.raises((ValueError, KeyError), match=words):
        load_sae(place)


def test_missing_and_damaged_files_are_refused(tmp_path):
    place = copied(FIXTURE["topk"], tmp_path)
    weights = place / "sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"sae_weights\.safetensors is cut short"):
        load_sae(place)
    weights.write_bytes(b"\x80\x04cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ValueError, match=r"is not a safetensors file"):
        load_sae(place)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"sae_weights\.safetensors is missing"):
        load_sae(place)
    weights.write_bytes(whole)
    (place / "cfg.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cfg\.json is missing"):
        load_sae(place)


@pytest.mark.parametrize(
    ("activation", "inference", "normalizer", "more"),
    [
        ("relu", "topk", "b_pre", {"statistics": ("log10_density",)}),
        ("relu", "topk", "none", {}),
        ("topk", "topk", "b_pre", {}),
        ("topk", "topk", "standardize", {}),
        ("signed_topk", "topk", "constant_norm", {}),
        ("jumprelu", "topk", "b_pre", {}),
        ("batch_topk", "threshold", "b_pre", {}),
        ("relu", "topk", "none", {"transcoder": True}),
        ("jumprelu", "topk", "none", {"transcoder": True, "skip": True}),
    ],
)
def test_what_is_written_reads_back_to_the_same_code(tmp_path, activation, inference, normalizer, more):
    """With `b_pre` and `b_out` that differ, which the format does not have: they are folded into the encoder's bias."""
    sae = random_sae(activation, inference, normalizer, hookpoint="unet.mid_block:diff", base_model="tiny/it", **more)
    sae_lens.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    x = torch.randn(9, 13, generator=torch.Generator().manual_seed(2))
    code, reconstruction = dense(sae, x)
    again = load_sae(tmp_path)
    assert detect(tmp_path).name == "sae_lens"
    for name in ("transcoder", "skip", "hookpoint", "base_model"):
        assert getattr(again.config, name) == getattr(sae.config, name), name
    assert (again.encode(x).dense() - code).abs().max() < 1e-4
    assert (again(x) - reconstruction).abs().max() < 1e-4
    for name in sae.config.statistics:
        assert torch.equal(again.statistic(name), sae.statistic(name).clamp(min=-10))


@pytest.mark.parametrize(
    "case", ["standard", "topk", "abstopk", "jumprelu", "skip_transcoder", "jumprelu_constant_norm"]
)
def test_a_file_written_again_holds_the_same_tensors(tmp_path, case):
    sae = load_sae(FIXTURE[case])
    sae_lens.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    theirs, ours = (load_file(place / "sae_weights.safetensors") for place in (FIXTURE[case], tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    written, config = (json.loads((place / "cfg.json").read_text()) for place in (tmp_path, FIXTURE[case]))
    metadata, theirs_metadata = written.pop("metadata"), config.pop("metadata")
    assert written == config
    assert metadata["hook_name"] == theirs_metadata["hook_name"]


@pytest.mark.parametrize(
    ("activation", "normalizer", "more", "words"),
    [
        ("raw_topk", "b_pre", {}, "cannot express activation 'raw_topk'"),
        ("batch_topk", "b_pre", {}, "cannot express activation 'batch_topk'"),
        ("groupmax", "b_pre", {}, "cannot express activation 'groupmax'"),
        ("topk", "none", {"transcoder": True}, "transcoders cannot express activation 'topk'"),
        ("topk", "pca", {}, "cannot express normalizer 'pca'"),
        ("relu", "b_pre", {"skip": True}, "with skip True and transcoder False"),
        ("topk", "standardize", {"eps": 1e-3}, r"cannot express eps 0\.001"),
    ],
)
def test_what_the_format_cannot_express_is_not_written(tmp_path, activation, normalizer, more, words):
    sae = random_sae(activation, normalizer=normalizer, **more)
    with pytest.raises(ValueError, match=words):
        sae_lens.FORMAT.write(tmp_path, sae.config, sae.state_dict())
    assert not any(tmp_path.iterdir())
