"""An SAEConfig in hand is a valid one."""

from __future__ import annotations

import json

import pytest

from sparsefeat.sae import SAEConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "d_model is 0"),
        ({"n_latents": 1.5}, "n_latents is 1.5"),
        ({"n_latents": True}, "n_latents is True"),
        ({"activation": "gelu"}, "activation is 'gelu': choose one of topk"),
        ({"normalizer": "layer_norm"}, "normalizer is 'layer_norm': choose one of none"),
        ({"inference": "sample"}, "inference is 'sample': choose one of"),
        ({"k": None}, "k is None"),
        ({"k": 0}, "k is 0"),
        ({"k": 33}, "k is 33 but n_latents is 32"),
        ({"activation": "relu"}, "k is 4 but activation 'relu' has none"),
        ({"inference": "threshold"}, "only 'batch_topk'"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"hookpoint": ""}, "hookpoint is ''"),
        ({"hookpoint": "unet.mid_block:residual"}, "output, input or diff"),
        ({"hookpoint": "unet.mid_block:text:diff"}, "ends in ':text:diff'"),
        ({"base_model": 3}, "base_model is 3"),
        ({"metadata": {"a": object()}}, "metadata cannot be JSON"),
        ({"metadata": [1]}, "metadata is a list"),
        ({"d_model": 1, "normalizer": "standardize"}, "at least 2"),
    ],
)
def test_an_invalid_value_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        SAEConfig(**({"d_model": 8, "n_latents": 32, "k": 4} | change))


def test_json_round_trip_keeps_everything():
    config = SAEConfig(
        8,
        32,
        "batch_topk",
        4,
        "threshold",
        "standardize",
        1e-6,
        "unet.mid_block.attentions.0:diff",
        "a/b",
        {"n": (1, 2)},
    )
    again = SAEConfig.from_json(json.loads(json.dumps(config.to_json())))
    assert again == config
    assert hash(again) == hash(config)
    assert again.metadata == {"n": [1, 2]}


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(ValueError, match=r"unknown keys \['groups'\]"):
        SAEConfig.from_json({"d_model": 8, "n_latents": 32, "activation": "relu", "groups": 2})
    with pytest.raises(ValueError, match=r"lacks \['activation'\]"):
        SAEConfig.from_json({"d_model": 8, "n_latents": 32})


@pytest.mark.parametrize("said", ["", ":diff", ":text", ":output:text", ":input:image"])
def test_a_hookpoint_may_say_the_tensor_and_the_stream(said):
    name = f"transformer.transformer_blocks.3{said}"
    assert SAEConfig(8, 32, k=4, hookpoint=name).hookpoint == name
