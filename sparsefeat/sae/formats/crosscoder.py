"""Crosscoders of crosscoder_learning: `model.safetensors` and `config.json`, or a state dict in one `.pt` file.

A crosscoder reads the same position at L layers (or of L models), `x [rows, L, d]`, with one code for all. Here it is an
SAE with d_model = L d of the layers' activations laid side by side, `x.flatten(1)`; `metadata["layers"]` is L.

    f = relu(sum_l xn_l W_enc[l] + b_enc),  active where f nu > theta,  xn_hat_l = f W_dec[l] + b_dec[l]

| tensor | shape | |
|---|---|---|
| encoder.weight, .bias | (L, d, n), (n) | fewer layers than the decoder where config.json has `encoder_layers` |
| decoder.weight, .bias | (L, n, d), (L, d) | rows are not unit vectors |
| threshold, k | () | theta, negative while unset; absent where every positive f is active |
| code_normalization_id | () | nu: 1 sum of the layers' decoder norms (also if absent), 2 norm over all layers, 3 both, 4 one |
| activation_mean, activation_std | (L, d) | NaN where activations are taken as they are |
| activation_global_scale | (L) | xn_l = (x_l - mean_l) scale_l; ones where it is (x_l - mean_l) / (std_l + 1e-8) instead |

Folded: theta / nu is the threshold of a jumprelu, mean is b_pre, and the scale goes into encoder, decoder and bias (going
back it is divided by scale + 1e-8, as the library has it). A decoupled crosscoder (5), whose code differs from layer to
layer, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats.format import Format, Given, check_tensors, mentions, read_json, read_torch

NAME, TITLE = "crosscoder", "crosscoder_learning"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
NORMALIZATIONS = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
COMPILED = "_orig_mod."  # what torch.compile puts before every key
EPS = 1e-8


def detect(place: Path) -> bool:
    if place.is_file() and place.suffix == ".pt":
        return mentions(place, "encoder.weight", "decoder.bias", "code_normalization_id")
    path = place / WEIGHTS
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            return {"encoder.weight", "decoder.weight"} <= keys and len(
                file.get_slice("encoder.weight").get_shape()
            ) == 3
    except SafetensorError:  # for whoever else has a file of that name
        return False


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place if place.is_file() else place / WEIGHTS
    described = read_json(place / CONFIG) if (place / CONFIG).is_file() else {}
    state = _state(path)
    decoder = state.get("decoder.weight")
    if not isinstance(decoder, Tensor) or decoder.ndim != 3:
        raise ValueError(
            f"{path} has no decoder.weight of three dimensions (it has {sorted(state)}): it is no crosscoder"
        )
    layers, n, d = decoder.shape
    encoded = _encoded_layers(path, described, layers)
    shapes = {
        "encoder.weight": (len(encoded), d, n),
        "encoder.bias": (n,),
        "decoder.weight": (layers, n, d),
        "decoder.bias": (layers, d),
    }
    t = {name: tensor.double() for name, tensor in check_tensors(path, state, shapes).items()}
    dtype = decoder.dtype
    encoder = torch.zeros(layers, d, n, dtype=torch.float64)
    encoder[encoded] = t["encoder.weight"]
    mean, scale, back = _normalizer(path, state, layers, d)
    tensors = {
        "W_enc": (encoder * scale.unsqueeze(-1)).permute(2, 0, 1).reshape(n, layers * d),
        "b_enc": t["encoder.bias"],
        "W_dec": (t["decoder.weight"] * back.unsqueeze(1)).permute(1, 0, 2).reshape(n, layers * d),
        "b_pre": mean.reshape(-1),
        "b_out": (t["decoder.bias"] * back + mean).reshape(-1),
    }
    normalization = _number(path, state, "code_normalization_id", 1)
    if normalization not in NORMALIZATIONS or NORMALIZATIONS[normalization] == "decoupled":
        raise ValueError(
            f"code_normalization_id in {path} is {normalization}: crosscoders whose layers share one code, "
            f"1 to 4, can be read"
        )
    metadata = {"layers": layers, "code_normalization": NORMALIZATIONS[normalization]}
    activation = "relu"
    if "threshold" in state:
        theta = float(check_tensors(path, state, {"threshold": ()})["threshold"])
        if theta < 0:
            raise ValueError(
                f"threshold in {path} is {theta}, unset: the crosscoder was saved before training had found one, "
                "take a later checkpoint"
            )
        metadata |= {"k": _number(path, state, "k", 0), "threshold": theta}
        nu = _code_scale(t["decoder.weight"], NORMALIZATIONS[normalization], described)
        # A latent without a decoder is never active: nothing in the dtype exceeds this threshold.
        never = torch.finfo(dtype).max
        tensors["threshold"] = torch.where(nu > 0, theta / nu, never).clamp(max=never)
        activation = "jumprelu"
    config = SAEConfig(
        layers * d,
        n,
        activation=activation,
        normalizer="b_pre" if mean.any() else "none",
        metadata=metadata,
    )
    return config, {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def _state(path: Path) -> dict[str, Any]:
    if path.suffix == ".pt":
        state = read_torch(path)
        if not isinstance(state, Mapping):
            raise ValueError(f"{path} holds a {type(state).__name__}: a state dict was expected")
        return {str(name).removeprefix(COMPILED): value for name, value in state.items()}
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): copy or download it again") from None


def _encoded_layers(path: Path, described: Mapping[str, Any], layers: int) -> list[int]:
    encoded = described.get("encoder_layers")
    if encoded is None:
        return list(range(layers))
    if not isinstance(encoded, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in encoded):
        raise ValueError(
            f"encoder_layers in {path.parent / CONFIG} is {encoded!r}: layers of 0 to {layers - 1} expected"
        )
    return encoded


def _number(path: Path, state: Mapping[str, Any], name: str, absent: int) -> int:
    value = state.get(name, torch.tensor(absent))
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_floating_point():
        raise ValueError(f"{name} in {path} is {value!r}: a whole number was expected")
    return int(value)


def _normalizer(path: Path, state: Mapping[str, Any], layers: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the factor on the way in, the factor on the way back, all `[layers, d]`."""
    ones = torch.ones(layers, d, dtype=torch.float64)
    if "activation_mean" not in state:
        return ones * 0, ones, ones
    t = check_tensors(path, state, {"activation_mean": (layers, d), "activation_std": (layers, d)})
    mean, std = t["activation_mean"].double(), t["activation_std"].double()
    if mean.isnan().any() or std.isnan().any():
        return ones * 0, ones, ones
    stored = check_tensors(path, state, {"activation_global_scale": (layers,)})["activation_global_scale"].double()
    if (stored == 1).all():
        return mean, 1 / (std + EPS), std + EPS
    scale = stored.unsqueeze(-1) * ones
    return mean, scale, 1 / (scale + EPS)


def _code_scale(decoder: Tensor, normalization: str, described: Mapping[str, Any]) -> Tensor:
    """nu, `[n]`, of `decoder [L, n, d]`."""
    summed = torch.linalg.vector_norm(decoder, dim=2).sum(0)
    whole = torch.linalg.vector_norm(decoder, dim=(0, 2))
    if normalization == "crosscoder":
        return summed
    if normalization == "sae":
        return whole
    if normalization == "mixed":
        alphas = [described.get(f"code_normalization_alpha_{name}") for name in ("sae", "cc")]
        alpha_sae, alpha_cc = (
            default if a is None else float(a) for a, default in zip(alphas, (1.0, 0.1), strict=True)
        )
        return alpha_sae * whole + alpha_cc * summed
    return torch.ones_like(summed)


FORMAT = Format(NAME, TITLE, (WEIGHTS, CONFIG), detect, read)
