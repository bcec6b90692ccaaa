"""Fixtures of the SAELens format, written and computed by sae-lens.

    .venv-peers/bin/python -m tools.interop.sae_lens [FOLDER]

Each is saved as its users save it: inference SAEs by `save_model`, trained BatchTopK and Matryoshka ones as JumpReLU by
`save_inference_model`, training checkpoints by `save_model` of the training class.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes import sae as base
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.interop import fixture

NAME, PACKAGE = "sae_lens", "sae-lens"
METADATA = {"model_name": "tiny/pipeline", "hook_name": "unet.mid_block.attentions.0", "context_size": 64}

# What `SAE.from_dict` is given, apart from what every case shares.
CASES: dict[str, dict[str, Any]] = {
    "standard": {"architecture": "standard", "d_in": 12, "d_sae": 20},
    "standard_square": {"architecture": "standard", "d_in": 14, "d_sae": 14, "apply_b_dec_to_input": False},
    "topk": {"architecture": "topk", "d_in": 12, "d_sae": 24, "k": 4},
    "topk_rescaled": {"architecture": "topk", "d_in": 12, "d_sae": 24, "k": 4, "rescale_acts_by_decoder_norm": True},
    "topk_layer_norm": {"architecture": "topk", "d_in": 12, "d_sae": 12, "k": 3, "normalize_activations": "layer_norm"},
    "abstopk": {"architecture": "abstopk", "d_in": 12, "d_sae": 20, "k": 5},
    "jumprelu": {"architecture": "jumprelu", "d_in": 12, "d_sae": 24},
    "jumprelu_constant_norm": {
        "architecture": "jumprelu",
        "d_in": 12,
        "d_sae": 12,
        "normalize_activations": "constant_norm_rescale",
        "apply_b_dec_to_input": False,
    },
    "gated": {"architecture": "gated", "d_in": 12, "d_sae": 20},
    "gated_square": {"architecture": "gated", "d_in": 12, "d_sae": 12, "apply_b_dec_to_input": False},
    "transcoder": {"architecture": "transcoder", "d_in": 12, "d_out": 12, "d_sae": 20},
    "skip_transcoder": {"architecture": "skip_transcoder", "d_in": 12, "d_out": 12, "d_sae": 12},
    "jumprelu_transcoder": {"architecture": "jumprelu_transcoder", "d_in": 12, "d_out": 12, "d_sae": 20},
    "jumprelu_skip_transcoder": {"architecture": "jumprelu_skip_transcoder", "d_in": 12, "d_out": 12, "d_sae": 20},
}

# Trained SAEs: architecture and what becomes of them on disk.
TRAINED: dict[str, dict[str, Any]] = {
    "batchtopk": {"architecture": "batchtopk", "d_in": 12, "d_sae": 24, "k": 4.0},
    "matryoshka": {
        "architecture": "matryoshka_batchtopk",
        "d_in": 12,
        "d_sae": 24,
        "k": 4.0,
        "matryoshka_widths": [8, 24],
    },
}


def open_with_peer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense code and reconstruction of `x`, by the package, of what lies in `folder`."""
    return computed(SAE.load_from_disk(folder), x)


def computed(sae: base.SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        code = sae.encode(x)
        return code, sae(x)


def opened(kind: Any, seed: int, **settings: Any) -> Any:
    """An SAE or a training SAE of these settings, every parameter random."""
    given = {"dtype": "float32", "device": "cpu", "metadata": METADATA, **settings}
    given.setdefault("apply_b_dec_to_input", "transcoder" not in given["architecture"])
    sae = kind.from_dict(given)
    fixture.fill(sae, seed)
    return sae


def make(folder: Path) -> None:
    for seed, (case, settings) in enumerate(CASES.items()):
        sae = opened(SAE, seed, **settings)
        place = fixture.new_case(folder / case)
        sae.save_model(place)
        x = fixture.rows(settings["d_in"], 100 + seed)
        fixture.write_expected(place, x, *computed(sae, x), NAME, PACKAGE)
    for seed, (case, settings) in enumerate(TRAINED.items(), start=50):
        make_trained(folder, case, settings, seed)
    make_unfolded(fixture.new_case(folder / "unfolded_scale"))
    make_log_threshold(fixture.new_case(folder / "log_threshold"))
    make_before_6(fixture.new_case(folder / "before_6"))
    make_sparsity(fixture.new_case(folder / "sparsity"))


def make_trained(folder: Path, case: str, settings: dict[str, Any], seed: int) -> None:
    """As inference SAE and as training checkpoint; both compute the same."""
    sae = opened(TrainingSAE, seed, **settings)
    sae.topk_threshold.fill_(0.9)
    x = fixture.rows(settings["d_in"], 100 + seed)
    place = fixture.new_case(folder / case)
    sae.save_inference_model(place)
    expected = open_with_peer(place, x)
    fixture.write_expected(place, x, *expected, NAME, PACKAGE)
    if case == "batchtopk":
        # save_inference_model folded the decoder's norms into the SAE it saved: from a new one, the same once more.
        sae = opened(TrainingSAE, seed, **settings)
        sae.topk_threshold.fill_(0.9)
        place = fixture.new_case(folder / "batchtopk_checkpoint")
        sae.save_model(place)
        fixture.write_expected(place, x, *expected, NAME, PACKAGE)


def make_unfolded(place: Path) -> None:
    """A checkpoint in the middle of training: the scale of the activations lies in a file of its own."""
    settings = {"architecture": "topk", "d_in": 12, "d_sae": 24, "k": 4, "rescale_acts_by_decoder_norm": True}
    sae = opened(TrainingSAE, 60, normalize_activations="expected_average_only_in", **settings)
    sae.save_model(place)
    scaler = ActivationScaler(scaling_factor=0.7)
    scaler.save(str(place / "activation_scaler.json"))
    x = fixture.rows(12, 160)
    with torch.no_grad():
        code = sae.encode(scaler.scale(x))
        reconstruction = scaler.unscale(sae.decode(code))
    fixture.write_expected(place, x, code, reconstruction, NAME, PACKAGE)


def make_log_threshold(place: Path) -> None:
    """A JumpReLU training checkpoint of before 6.48, with the logarithm of its thresholds."""
    sae = opened(TrainingSAE, 61, architecture="jumprelu", d_in=12, d_sae=20)
    sae.threshold.data.abs_().add_(0.1)
    sae.save_model(place)
    weights = load_file(place / "sae_weights.safetensors")
    weights["log_threshold"] = weights.pop("threshold").log()
    save_file(weights, place / "sae_weights.safetensors")
    x = fixture.rows(12, 161)
    fixture.write_expected(place, x, *computed(TrainingSAE.load_from_disk(place), x), NAME, PACKAGE)


def make_before_6(place: Path) -> None:
    """Weights as saved today under a config with the keys of sae-lens 3 to 5, which the package converts as it loads."""
    opened(SAE, 62, architecture="topk", d_in=12, d_sae=24, k=5).save_model(place)
    old = {
        "d_in": 12,
        "d_sae": 24,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": METADATA["model_name"],
        "hook_point": METADATA["hook_name"],
        "hook_point_layer": 0,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
        "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False,
        "sae_lens_training_version": "3.20.1",
    }
    (place / "cfg.json").write_text(json.dumps(old))
    x = fixture.rows(12, 162)
    fixture.write_expected(place, x, *open_with_peer(place, x), NAME, PACKAGE)


def make_sparsity(place: Path) -> None:
    """With the logarithm of every latent's density beside the weights, as the trainer writes it."""
    sae = opened(SAE, 63, architecture="standard", d_in=8, d_sae=16)
    sae.save_model(place)
    density = torch.rand(16, generator=torch.Generator().manual_seed(63))
    save_file({"sparsity": (density + 1e-10).log10()}, place / "sparsity.safetensors")
    x = fixture.rows(8, 163)
    fixture.write_expected(place, x, *computed(sae, x), NAME, PACKAGE)


if __name__ == "__main__":
    fixture.main(NAME, make)
