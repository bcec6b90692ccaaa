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
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, listed, read_json, say, shown, weights
from sparsefeat.sae.formats.fold import cannot_express, check_affine, encoder_bias, wide
from sparsefeat.sae.formats.foreign_config import config_of, text, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "dictionary_learning", "dictionary_learning"
WEIGHTS, CONFIG = "ae.pt", "config.json"
KEPT = ("layer", "lm_name", "submodule_name", "wandb_name")
# Keys of trainers that say how, not what: sizes that the tensors say too, and schedules.
HARMLESS = listed(
    "trainer_class activation_dim dict_size group_fractions group_weights group_sizes num_groups multipliers "
    "bandwidth threshold_beta dead_feature_threshold k_values p_start p_end anneal_start"
)
UNIT = 1e-2  # norms this far from one change codes by as much


def detect(place: Path) -> bool:
    return (place / WEIGHTS).exists() or (place.is_file() and re.fullmatch(r"ae(_\d+)?\.pt", place.name) is not None)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place if place.is_file() else place / WEIGHTS
    described = _config(path)
    trainer = Described(described.path, described.get("trainer", {}))
    with weights(path, inside="ae") as held:
        config, tensors = _read(path, given, described, trainer, held)
    trainer.check(HARMLESS)
    return config, tensors


def _read(
    path: Path, given: Given, described: Described, trainer: Described, held: Weights
) -> tuple[SAEConfig, dict[str, Tensor]]:
    kind, buffer = trainer.get("dict_class"), described.get("buffer")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(
            f"dict_class in {described.path} is {shown(kind)}: it must be one of {', '.join(READERS)}, and without it "
            "classes that store the same tensors cannot be told apart"
        )
    if "encoder.weight" in held:
        n_latents, d_model = held.matrix("encoder.weight")
    elif "W_enc" in held:
        d_model, n_latents = held.matrix("W_enc")
    else:
        raise ValueError(f"{path} has no encoder.weight or W_enc (it has {shown(sorted(held))}): it holds no {kind}")
    fields, tensors = READERS[kind](trainer, held, n_latents, d_model)
    if "k" in fields and given.k is not None:
        fields["k"] = given.k
    elif "k" in fields and trainer.get("k") not in (None, fields["k"]):  # also while a run lowers its k
        say(
            path,
            f"k is {fields['k']} here and {shown(trainer['k'])} in {described.path}; the weights' own is used, as the "
            "library does: pass k= for another",
        )
    scale = held.around.get("norm_factor")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            raise ValueError(f"norm_factor in {path} is {shown(scale)}: a positive number was expected")
        for name in ("b_enc", "b_pre", "b_out", "threshold"):
            if name in tensors and not (tensors[name].ndim == 0 and tensors[name] < 0):
                tensors[name] = tensors[name].to(wide(tensors[name].dtype)) * scale
        if scale != 1:
            say(
                path,
                f"codes are in the activations' own units, {scale:.4g} (norm_factor) times those of the training run",
            )
    metadata = {name: trainer[name] for name in KEPT if trainer.get(name) is not None} | fields.pop("metadata", {})
    config = config_of(
        described.path,
        d_model=d_model,
        n_latents=n_latents,
        base_model=text(described.path, trainer, "lm_name"),
        transcoder=isinstance(buffer, Mapping) and buffer.get("io") == "in_and_out",
        metadata={"dict_class": kind, **metadata},
        **fields,
    )
    return config, tensors


def _config(path: Path) -> Described:
    beside = path.parent / CONFIG
    above = path.parent.parent / CONFIG
    place = above if path.parent.name == "checkpoints" and above.exists() else beside
    described = Described(place, read_json(place))
    if not isinstance(described.get("trainer", {}), dict):
        raise ValueError(f"trainer in {place} is {shown(described['trainer'])}: an object with dict_class was expected")
    return described


def _k(trainer: Described, held: Weights) -> int:
    """Of the weights, or of the config, in files of before k was stored with them."""
    trainer.get("k")
    return held.number("k") if "k" in held else whole_number(trainer.path, trainer, "k")


def _top_k(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "b_dec": (d,)}
    t = held.take(shapes)
    tensors = one_bias(t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t["b_dec"])
    fields: dict[str, Any] = {"activation": "topk", "k": _k(trainer, held), "normalizer": "b_pre"}
    if "threshold" in held:  # older files have none
        fields["metadata"] = {"threshold": float(held.take({"threshold": ()})["threshold"])}
    return fields, tensors


def _batch_top_k(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    fields, tensors = _top_k(trainer, held, n, d)
    return _thresholded(held, fields["k"]), tensors | _threshold(held)


def _matryoshka(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    t = held.take({"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)})
    fields = _thresholded(held, _k(trainer, held))
    groups = held.whole_numbers("group_sizes")
    if groups is not None and groups.ndim == 1:
        fields["metadata"] = {"group_sizes": groups.tolist()}
    tensors = one_bias(t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"])
    return fields, tensors | _threshold(held)


def _threshold(held: Weights) -> dict[str, Tensor]:
    return held.take({"threshold": ()})


def _thresholded(held: Weights, k: int) -> dict[str, Any]:
    inference = "threshold" if float(_threshold(held)["threshold"]) >= 0 else "topk"
    return {"activation": "batch_topk", "k": k, "inference": inference, "normalizer": "b_pre"}


def _jump_relu(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
    t = held.take(shapes)
    tensors = one_bias(t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"], subtracted=False)
    tensors["threshold"] = t["threshold"]
    return {"activation": "jumprelu", "normalizer": "none"}, tensors


def _gated(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {
        "encoder.weight": (n, d),
        "decoder.weight": (d, n),
        "decoder_bias": (d,),
        "r_mag": (n,),
        "gate_bias": (n,),
        "mag_bias": (n,),
    }
    t = held.take(shapes)
    growth = t["r_mag"].double().exp()
    dtype = wide(t["encoder.weight"].dtype)
    tensors = {
        "W_enc": t["encoder.weight"].to(dtype) * growth.to(dtype).unsqueeze(1),
        "b_enc": t["mag_bias"],
        "W_dec": t["decoder.weight"].T.contiguous(),
        "b_pre": t["decoder_bias"],
        "b_out": t["decoder_bias"],
        "threshold": (t["mag_bias"].double() - growth * t["gate_bias"].double()).to(dtype),
    }
    return {"activation": "jumprelu", "normalizer": "b_pre", "metadata": {"architecture": "gated"}}, tensors


def _relu(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "bias": (d,)}
    t = held.take(shapes)
    tensors = one_bias(t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t["bias"])
    norms = torch.linalg.vector_norm(t["decoder.weight"], dim=0, dtype=torch.float64)
    if not torch.allclose(norms, torch.ones_like(norms), rtol=UNIT, atol=0):
        say(
            held.path,
            f"codes are in units of the stored decoder rows, of norms {norms.min():.3g} to {norms.max():.3g}; the "
            "library's from_pretrained makes these one and multiplies the code by them",
        )
    return {"activation": "relu", "normalizer": "b_pre"}, tensors


def _relu_new(trainer: Described, held: Weights, n: int, d: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
    t = held.take(shapes)
    tensors = one_bias(
        t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t["decoder.bias"], subtracted=False
    )
    return {"activation": "relu", "normalizer": "none"}, tensors


READERS: dict[str, Callable[[Described, Weights, int, int], tuple[dict[str, Any], dict[str, Tensor]]]] = {
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
            "threshold": t["threshold"] if by_threshold else torch.tensor(-1.0, dtype=torch.float32),
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
