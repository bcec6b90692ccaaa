"""Gemma Scope 1 and 2 (arXiv 2408.05147): a folder with `params.npz`, or `params.safetensors` and `config.json`.

| tensor | shape | |
|---|---|---|
| w_enc, w_dec (W_enc, W_dec in some) | (d, n), (n, d) | JumpReLU; `b_dec` is not subtracted from the input |
| b_enc, b_dec, threshold | (n), (d), (n) | |
| affine_skip_connection | (d, d) | of a transcoder: x times it is added to the output |

What the files do not say their path does: `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`. Residual SAEs are of a
layer's output, mlp of the norm after it, att of what goes into `o_proj`. SAEs of the embedding were made for embeddings
divided by sqrt(d): scaled to the model's own, which go into its first layer.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, read_json, shown, weights
from sparsefeat.sae.formats.fold import wide
from sparsefeat.sae.formats.foreign_config import config_of, flag, text
from sparsefeat.sae.formats.format import Format, Given, one_bias
from sparsefeat.sae.formats.language.places import said_by

NAME, TITLE = "gemma_scope", "Gemma Scope 1 and 2"
FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"
HARMLESS = frozenset({"width", "type", "hook_type", "hf_hook_point_out", "num_features", "site", "d_model", "d_sae"})
KINDS = {
    "res": "model.layers.{}",
    "mlp": "model.layers.{}.post_feedforward_layernorm",
    "att": "model.layers.{}.self_attn.o_proj:input",
}


def detect(place: Path) -> bool:
    return (place / FIRST).exists() or (place / SECOND).exists()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    second = (place / SECOND).exists()
    beside = place / CONFIG
    values = Described(beside, read_json(beside) if second and beside.exists() else {})
    with weights(place / (SECOND if second else FIRST)) as held:
        found = _read(place, values, held)
    values.check(HARMLESS)
    return found


def _read(place: Path, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    enc, dec = ("W_enc", "W_dec") if "W_enc" in held else ("w_enc", "w_dec")
    d, n = held.matrix(enc)
    shapes = {enc: (d, n), dec: (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)}
    skip = "affine_skip_connection" in held
    if skip:
        shapes["affine_skip_connection"] = (d, d)
    if text(values.path, values, "architecture") not in (None, "jump_relu"):
        raise ValueError(f"architecture in {values.path} is {shown(values['architecture'])}: jump_relu can be read")
    if values and flag(values.path, values, "affine_connection", default=skip) != skip:
        raise ValueError(f"affine_connection in {values.path} does not fit {held.path}: they do not belong together")
    t = held.take(shapes)
    said = said_by(place)
    transcoder = skip or "transcoder" in said
    tensors = one_bias(t[enc].T, t["b_enc"], t[dec], t["b_dec"], subtracted=False)
    tensors["threshold"] = t["threshold"]
    if skip:
        tensors["W_skip"] = t["affine_skip_connection"].T.contiguous()
    if "/embedding" in said:
        for name, factor in (("W_enc", 1 / math.sqrt(d)), ("W_dec", math.sqrt(d))):
            tensors[name] = tensors[name].to(wide(tensors[name].dtype)) * factor
    config = config_of(
        held.path,
        d_model=d,
        n_latents=n,
        activation="jumprelu",
        normalizer="none",
        transcoder=transcoder,
        skip=skip,
        hookpoint=_hookpoint(said, text(values.path, values, "hf_hook_point_in")),
        base_model=_base_model(said, text(values.path, values, "model_name")),
        metadata={"folder": "/".join(place.absolute().parts[-3:])},
    )
    return config, tensors


def _hookpoint(said: str, place: str | None) -> str | None:
    """What the config says, `model.layers.N.MODULE.output`, or what the folders are called; None if neither is known."""
    if place is not None:
        path, _, io = place.rpartition(".")
        return {"input": f"{path}:input", "output": path}.get(io, place)
    kind = re.search(r"gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att)\b", said)
    layer = re.search(r"/layer_(\d+)", said)
    if kind and kind[1] == "res" and "/embedding" in said:
        return "model.layers.0:input"
    return KINDS[kind[1]].format(layer[1]) if kind and layer else None


def _base_model(said: str, name: str | None) -> str | None:
    if name is not None:
        name = name.replace("-v3-", "-3-")  # as some configs have it
        return name if "/" in name else f"google/{name}"
    found = re.search(r"gemma-scope-(\d+b)-(pt|it)\b", said)
    return f"google/gemma-2-{found[1]}{'-it' if found[2] == 'it' else ''}" if found else None


FORMAT = Format(NAME, TITLE, (), detect, read, optional=(FIRST, SECOND, CONFIG))
