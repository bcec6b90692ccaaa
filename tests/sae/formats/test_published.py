"""Layouts of published SAEs of language models, and others that came later: read as SAELens or the description has them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsefeat.sae import load_sae
from sparsefeat.sae.formats import detect
from tests.sae.formats.expected import TOLERANCE, cases, copied, expected, largest_difference, made_by, opened

NAMES = ["gemma_scope", "llama_scope", "goodfire", "qwen_scope", "mwhanna", "matryoshka", "bionemo", "difffract"]
CASES = [case for name in NAMES for case in cases(name)]
PLACES = {
    "gemma_scope/residual": ("model.layers.3", "google/gemma-2-2b"),
    "gemma_scope/mlp": ("model.layers.4.post_feedforward_layernorm", "google/gemma-2-2b"),
    "gemma_scope/attention": ("model.layers.5.self_attn.o_proj:input", "google/gemma-2-2b"),
    "gemma_scope/embedding": ("model.layers.0:input", "google/gemma-2-2b"),
    "gemma_scope/instruct": ("model.layers.9", "google/gemma-2-9b-it"),
    "gemma_scope/second_residual": ("model.layers.7", "google/gemma-3-1b-it"),
    "gemma_scope/second_transcoder": ("model.layers.7.pre_feedforward_layernorm", "google/gemma-3-1b-it"),
    "llama_scope/residual": ("model.layers.15", "meta-llama/Llama-3.1-8B"),
    "llama_scope/mlp": ("model.layers.15.mlp", "meta-llama/Llama-3.1-8B"),
    "goodfire/layer_19": ("model.layers.19", "meta-llama/Llama-3.1-8B-Instruct"),
    "qwen_scope/layer_6": ("model.layers.6", "Qwen/Qwen3-1.7B-Base"),
    "mwhanna/qwen3_4b": ("model.layers.9.mlp:input", "Qwen/Qwen3-4B"),
    "mwhanna/qwen3_14b": ("model.layers.9.mlp:input", "Qwen/Qwen3-14B"),
    "difffract/sae_img_12": ("transformer.transformer_blocks.12.ff", "black-forest-labs/FLUX.1-schnell"),
    "difffract/sae_txt_18": ("transformer.transformer_blocks.18.ff_context", "black-forest-labs/FLUX.1-schnell"),
    "difffract/transcoder_img_6": ("transformer.transformer_blocks.6.ff:input", "black-forest-labs/FLUX.1-schnell"),
}


def place_of(case: Path, copy: Path | None = None) -> Path:
    made = made_by(case)
    return (copy or case) / made["file"] if made.get("file") else copy or case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_code_and_reconstruction_are_what_others_compute(case):
    assert detect(place_of(case)).name == case.parent.name
    assert largest_difference(opened(case), case) < TOLERANCE


@pytest.mark.parametrize("name", PLACES)
def test_where_it_belongs_comes_from_names_and_configs(name):
    format_name, case = name.split("/")
    config = opened(next(c for c in cases(format_name) if c.name == case)).config
    assert (config.hookpoint, config.base_model) == PLACES[name]
    assert config.transcoder == ("transcoder" in name or format_name == "mwhanna")


def named(name: str) -> Path:
    return next(case for case in CASES if f"{case.parent.name}/{case.name}" == name)


def test_gemma_scope_of_another_shape_or_architecture_is_refused(tmp_path):
    case = named("gemma_scope/residual")
    place = place_of(case, copied(case, tmp_path))
    arrays = dict(np.load(place / "params.npz"))
    np.savez(place / "params.npz", **arrays | {"w_dec": arrays["w_dec"].T})
    with pytest.raises(ValueError, match=r"w_dec in .* has shape \[12, 20\], \[20, 12\] was expected"):
        load_sae(place)
    np.savez(place / "params.npz", **arrays | {"scaling_factor": arrays["b_enc"]})
    with pytest.raises(ValueError, match="has scaling_factor, which this format's SAEs do not have"):
        load_sae(place)
    case = named("gemma_scope/second_transcoder")
    place = place_of(case, copied(case, tmp_path / "second"))
    values = json.loads((place / "config.json").read_text())
    for change, words in [
        ({"architecture": "topk"}, "architecture in .* is 'topk'"),
        ({"affine_connection": False}, "affine_connection in .* does not fit"),
        ({"gated": True}, "says gated True, which is not understood"),
    ]:
        (place / "config.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=words):
            load_sae(place)


def test_llama_scope_of_other_settings_is_refused(tmp_path):
    case = named("llama_scope/residual")
    place = place_of(case, copied(case, tmp_path))
    values = json.loads((place / "hyperparams.json").read_text())
    for change, words in [
        ({"act_fn": "topk"}, "act_fn and norm_activation"),
        ({"norm_activation": "token-wise"}, "act_fn and norm_activation"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "bias before the encoder"),
        ({"sparsity_include_decoder_norm": True}, "decoder rows of norms"),
        ({"dataset_average_activation_norm": {"in": 0}}, "two positive numbers"),
        ({"hook_point_out": "blocks.15.hook_mlp_out"}, "SAEs can be read"),
    ]:
        (place / "hyperparams.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=words):
            load_sae(place)


def test_k_of_qwen_scope_is_the_repositorys_or_the_callers(tmp_path):
    case = named("qwen_scope/layer_6")
    assert opened(case).config.k == 5
    moved = (tmp_path / "layer6.sae.pt").resolve()
    moved.write_bytes(place_of(case).read_bytes())
    with pytest.raises(ValueError, match=r"does not hold k, and no folder above it is called …-L0_K: pass it"):
        load_sae(moved)
    assert largest_difference(load_sae(moved, k=5), case) < TOLERANCE
    wrong = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W2K-L0_5"
    wrong.mkdir()
    (wrong / "layer6.sae.pt").write_bytes(moved.read_bytes())
    with pytest.raises(ValueError, match=r"has 1024 latents and lies in SAE-Res-Qwen3-1\.7B-Base-W2K-L0_5"):
        load_sae(wrong / "layer6.sae.pt")


def test_a_bias_that_saedit_stores_and_never_uses_makes_no_difference(tmp_path):
    case = named("matryoshka/plain")
    place = copied(case, tmp_path)
    state = torch.load(place / "pytorch_model.bin", weights_only=True)
    assert state["b_enc"].abs().max() > 0.1
    torch.save(state | {"b_enc": 100 * state["b_enc"]}, place / "pytorch_model.bin")
    assert largest_difference(load_sae(place), case) < TOLERANCE
    assert load_sae(place).config.metadata["group_sizes"] == [8, 16]
    assert (expected(case)["code"] > 0).any()


def test_bionemo_of_other_settings_is_refused(tmp_path):
    case = named("bionemo/topk")
    file = place_of(case, copied(case, tmp_path))
    held = torch.load(file, weights_only=True)
    torch.save(held | {"model_config": held["model_config"] | {"normalize_input": True}}, file)
    with pytest.raises(ValueError, match="says normalize_input True, which is not understood"):
        load_sae(file)
    torch.save(held | {"hidden_dim": 99}, file)
    with pytest.raises(ValueError, match=r"encoder.weight in .* has shape \[24, 12\], \[99, 12\] was expected"):
        load_sae(file)
