"""saprmarks/dictionary_learning: a state dict `ae.pt`, and beside it `config.json`, which names the class.

`{"trainer": {"dict_class", "activation_dim", "dict_size", "k", "layer", "lm_name", "submodule_name", …}, "buffer": {…}}`.
`checkpoints/ae_STEP.pt` has the config one folder up. The `ae.pt` of a run that goes on is
`{"step", "ae", "optimizer", "config", "norm_factor"}`, its weights made for activations divided by `norm_factor`; a
finished one has had its biases and threshold multiplied by it.

| class | here | subtracted from the input |
|---|---|---|
| AutoEncoderTopK | topk; its `threshold` is not used at inference | b_dec |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | batch_topk, inference by `threshold`; by top-k where that is unset (-1) | b_dec |
| JumpReluAutoEncoder | jumprelu | nothing |
| GatedAutoEncoder | jumprelu (see `SAEConfig`) | decoder_bias |
| AutoEncoder | relu | bias |
| AutoEncoderNew | relu | nothing |

`encoder.weight` is [n_latents, d_model], `decoder.weight` [d_model, n_latents]; `W_enc` and `W_dec` are the other way round.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats.fold import cannot_express, check_affine, encoder_bias
from sparsefeat.sae.formats.format import Format, Given, check_tensors, read_json, read_torch

NAME, TITLE = "dictionary_learning", "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
KEPT = ("layer", "lm_name", "submodule_name", "wandb_name")


def detect(place: Path) -> bool:
    return (place / WEIGHTS).is_file() or (place.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", place.name) is not None)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place if place.is_file() else place / WEIGHTS
    described = _config(path)
    trainer, buffer = described.get("trainer", {}), described.get("buffer", {})
    state = read_torch(path)
    scale = None
    if isinstance(state, Mapping) and "ae" in state and "encoder.weight" not in state:
        state, scale = state["ae"], state.get("norm_factor")
    kind = trainer.get("dict_class")
    if kind not in READERS:
        raise ValueError(
            f"dict_class in {path.parent / CONFIG} is {kind!r}: it must be one of {', '.join(READERS)}, and without it "
            "classes that store the same tensors cannot be told apart"
        )
    encoder = state.get("encoder.weight", state.get("W_enc")) if isinstance(state, Mapping) else None
    if not isinstance(encoder, Tensor) or encoder.ndim != 2:
        raise ValueError(f"{path} has no encoder.weight or W_enc of two dimensions: it holds no {kind}")
    n_latents, d_model = encoder.shape if "encoder.weight" in state else reversed(encoder.shape)
    if "k" not in state and isinstance(trainer.get("k"), int):  # files of before k was stored with the weights
        state = {**state, "k": torch.tensor(trainer["k"])}
    fields, tensors = READERS[kind](path, state, int(n_latents), int(d_model))
    if "k" in fields and given.k is not None:
        fields["k"] = given.k
    if scale is not None:
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise ValueError(f"norm_factor in {path} is {scale!r}: a positive number was expected")
        for name in ("b_enc", "b_pre", "b_out", "threshold"):
            if name in tensors and not (tensors[name].ndim == 0 and tensors[name] < 0):
                tensors[name] = tensors[name] * scale
    metadata = {name: trainer[name] for name in KEPT if trainer.get(name) is not None} | fields.pop("metadata", {})
    config = SAEConfig(
        d_model=int(d_model),
        n_latents=int(n_latents),
        base_model=trainer.get("lm_name") or None,
        transcoder=isinstance(buffer, Mapping) and buffer.get("io") == "in_and_out",
        metadata={"dict_class": kind, **metadata},
        **fields,
    )
    return config, tensors


def _config(path: Path) -> dict[str, Any]:
    beside = path.parent / CONFIG
    above = path.parent.parent / CONFIG
    described = read_json(above if path.parent.name == "checkpoints" and above.is_file() else beside)
    if not isinstance(described.get("trainer", {}), dict):
        raise ValueError(f"trainer in {beside} is {described['trainer']!r}: an object with dict_class was expected")
    return described


def _whole_number(path: Path, state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} in {path} is {value!r}: a whole number was expected")
    return int(value)


def _top_k(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "b_dec": (d,)}
    t = check_tensors(path, state, shapes)
    tensors = {
        "W_enc": t["encoder.weight"],
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T.contiguous(),
        "b_pre": t["b_dec"],
        "b_out": t["b_dec"],
    }
    fields: dict[str, Any] = {"activation": "topk", "k": _whole_number(path, state, "k"), "normalizer": "b_pre"}
    if "threshold" in state:  # older files have none
        fields["metadata"] = {"threshold": float(check_tensors(path, state, {"threshold": ()})["threshold"])}
    return fields, tensors


def _batch_top_k(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields, tensors = _top_k(path, state, n, d)
    return _thresholded(path, state, fields["k"]), tensors | _threshold(path, state)


def _matryoshka(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    t = check_tensors(path, state, {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)})
    fields = _thresholded(path, state, _whole_number(path, state, "k"))
    groups = state.get("group_sizes")
    if isinstance(groups, Tensor) and groups.ndim == 1:
        fields["metadata"] = {"group_sizes": [int(size) for size in groups.tolist()]}
    tensors = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_pre": t["b_dec"],
        "b_out": t["b_dec"],
    }
    return fields, tensors | _threshold(path, state)


def _threshold(path: Path, state: Mapping[str, Any]) -> dict[str, Tensor]:
    return check_tensors(path, state, {"threshold": ()})


def _thresholded(path: Path, state: Mapping[str, Any], k: int) -> dict[str, Any]:
    inference = "threshold" if float(_threshold(path, state)["threshold"]) >= 0 else "topk"
    return {"activation": "batch_topk", "k": k, "inference": inference, "normalizer": "b_pre"}


def _jump_relu(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
    t = check_tensors(path, state, shapes)
    tensors = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["b_enc"],
        "W_dec": t["W_dec"],
        "b_pre": torch.zeros_like(t["b_dec"]),
        "b_out": t["b_dec"],
        "threshold": t["threshold"],
    }
    return {"activation": "jumprelu", "normalizer": "none"}, tensors


def _gated(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {
        "encoder.weight": (n, d),
        "decoder.weight": (d, n),
        "decoder_bias": (d,),
        "r_mag": (n,),
        "gate_bias": (n,),
        "mag_bias": (n,),
    }
    t = check_tensors(path, state, shapes)
    growth = t["r_mag"].double().exp()
    dtype = t["encoder.weight"].dtype
    tensors = {
        "W_enc": (growth.unsqueeze(1) * t["encoder.weight"].double()).to(dtype),
        "b_enc": t["mag_bias"],
        "W_dec": t["decoder.weight"].T.contiguous(),
        "b_pre": t["decoder_bias"],
        "b_out": t["decoder_bias"],
        "threshold": (t["mag_bias"].double() - growth * t["gate_bias"].double()).to(dtype),
    }
    return {"activation": "jumprelu", "normalizer": "b_pre", "metadata": {"architecture": "gated"}}, tensors


def _relu(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "bias": (d,)}
    t = check_tensors(path, state, shapes)
    tensors = {
        "W_enc": t["encoder.weight"],
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T.contiguous(),
        "b_pre": t["bias"],
        "b_out": t["bias"],
    }
    return {"activation": "relu", "normalizer": "b_pre"}, tensors


def _relu_new(path: Path, state: Mapping[str, Any], n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
    t = check_tensors(path, state, shapes)
    tensors = {
        "W_enc": t["encoder.weight"],
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T.contiguous(),
        "b_pre": torch.zeros_like(t["decoder.bias"]),
        "b_out": t["decoder.bias"],
    }
    return {"activation": "relu", "normalizer": "none"}, tensors


READERS: dict[str, Callable[[Path, Mapping[str, Any], int, int], tuple[dict[str, Any], dict[str, Tensor]]]] = {
    "AutoEncoderTopK": _top_k,
    "BatchTopKSAE": _batch_top_k,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu,
    "GatedAutoEncoder": _gated,
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_new,
}


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """One of AutoEncoderTopK, BatchTopKSAE, JumpReluAutoEncoder, AutoEncoderNew; biases are folded into theirs."""
    check_affine(TITLE, config)
    t = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    state: dict[str, Tensor]
    if config.activation in ("topk", "batch_topk"):
        by_threshold = config.inference == "threshold"
        kind = "BatchTopKSAE" if by_threshold else "AutoEncoderTopK"
        state = {
            "b_dec": t["b_out"],
            "k": torch.tensor(config.k, dtype=torch.int32),
            "threshold": t["threshold"] if by_threshold else torch.tensor(-1.0),
            "decoder.weight": t["W_dec"].T.contiguous(),
            "encoder.weight": t["W_enc"],
            "encoder.bias": encoder_bias(t, t["b_out"]),
        }
    elif config.activation == "jumprelu":
        kind = "JumpReluAutoEncoder"
        state = {
            "W_enc": t["W_enc"].T.contiguous(),
            "b_enc": encoder_bias(t, None),
            "W_dec": t["W_dec"],
            "b_dec": t["b_out"],
            "threshold": t["threshold"],
        }
    elif config.activation == "relu":
        kind = "AutoEncoderNew"
        state = {
            "encoder.weight": t["W_enc"],
            "encoder.bias": encoder_bias(t, None),
            "decoder.weight": t["W_dec"].T.contiguous(),
            "decoder.bias": t["b_out"],
        }
    else:
        raise cannot_express(TITLE, config)
    trainer: dict[str, Any] = {
        **{name: config.metadata[name] for name in KEPT if name in config.metadata},
        "dict_class": kind,
        "activation_dim": config.d_model,
        "dict_size": config.n_latents,
        "lm_name": config.base_model or "",
    }
    if config.k is not None:
        trainer["k"] = config.k
    buffer = {"io": "in_and_out"} if config.transcoder else {}
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps({"trainer": trainer, "buffer": buffer}, indent=4) + "\n", encoding="utf-8")


FORMAT = Format(NAME, TITLE, (WEIGHTS, CONFIG), detect, read, write)
