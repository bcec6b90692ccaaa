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

from pathlib import Path

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, listed, names_in, read_json, shape_in, shown, weights
from sparsefeat.sae.formats.fold import wide
from sparsefeat.sae.formats.foreign_config import config_of, number
from sparsefeat.sae.formats.format import Format, Given

NAME, TITLE = "crosscoder", "crosscoder_learning"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
NORMALIZATIONS = {1: "crosscoder", 2: "sae", 3: "mixed", 4: "none", 5: "decoupled"}
HARMLESS = frozenset({"target_rms", "k", "code_normalization_id"})  # of the training, or said by the numbers above
# Sizes that the tensors say too, and what code_normalization_id says.
HARMLESS_KEYS = listed(
    "activation_dim dict_size num_layers code_normalization code_normalization_alpha_sae "
    "code_normalization_alpha_cc same_init_for_all_layers norm_init_scale use_threshold target_rms "
    "keep_relative_variance activation_normalizer k model_type sparsity_loss"
)
EPS = 1e-8


def detect(place: Path) -> bool:
    if place.is_file() and place.suffix == ".pt":
        return {"encoder.weight", "decoder.bias", "code_normalization_id"} <= names_in(place)
    if not (place / WEIGHTS).is_file():
        return False
    return len(shape_in(place / WEIGHTS, "encoder.weight") or ()) == 3  # somebody else may have a file of that name


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place if place.is_file() else place / WEIGHTS
    beside = place / CONFIG
    described = Described(beside, read_json(beside) if place.is_dir() and beside.exists() else {})
    with weights(path, HARMLESS) as held:
        config, tensors = _read(described, held)
    described.check(HARMLESS_KEYS)
    return config, tensors


def _read(described: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = held.path
    shape = held.shape("decoder.weight")
    if shape is None or len(shape) != 3:
        raise ValueError(
            f"{path} has no decoder.weight of three dimensions (it has {shown(sorted(held))}): it is no crosscoder"
        )
    layers, n, d = shape
    encoded = _encoded_layers(described, layers)
    shapes = {
        "encoder.weight": (len(encoded), d, n),
        "encoder.bias": (n,),
        "decoder.weight": (layers, n, d),
        "decoder.bias": (layers, d),
    }
    t = held.take(shapes)
    dtype = wide(t["decoder.weight"].dtype)
    mean, scale, back = _normalizer(held, layers, d)
    W_enc, W_dec = (torch.zeros(n, layers, d, dtype=dtype) for _ in range(2))
    for layer, of_layer in zip(encoded, t["encoder.weight"], strict=True):
        W_enc[:, layer] = of_layer.T * scale[layer].to(dtype)
    for layer, of_layer in enumerate(t["decoder.weight"]):
        W_dec[:, layer] = of_layer * back[layer].to(dtype)
    tensors = {
        "W_enc": W_enc.view(n, layers * d),
        "b_enc": t["encoder.bias"],
        "W_dec": W_dec.view(n, layers * d),
        "b_pre": mean.reshape(-1).to(dtype),
        "b_out": (t["decoder.bias"].double() * back + mean).reshape(-1).to(dtype),
    }
    normalization = held.number("code_normalization_id", 1)
    if normalization not in NORMALIZATIONS or NORMALIZATIONS[normalization] == "decoupled":
        raise ValueError(
            f"code_normalization_id in {path} is {normalization}: crosscoders whose layers share one code, "
            f"1 to 4, can be read"
        )
    metadata = {"layers": layers, "code_normalization": NORMALIZATIONS[normalization]}
    activation = "relu"
    if "threshold" in held:
        theta = float(held.take({"threshold": ()})["threshold"])
        if theta < 0:
            raise ValueError(
                f"threshold in {path} is {theta}, unset: the crosscoder was saved before training had found one, "
                "take a later checkpoint"
            )
        metadata |= {"k": held.number("k", 0), "threshold": theta}
        nu = _code_scale(t["decoder.weight"], NORMALIZATIONS[normalization], described)
        # A latent without a decoder is never active: nothing in the dtype exceeds this threshold.
        never = torch.finfo(dtype).max
        tensors["threshold"] = torch.where(nu > 0, theta / nu, never).clamp(max=never).to(dtype)
        activation = "jumprelu"
    config = config_of(
        path,
        d_model=layers * d,
        n_latents=n,
        activation=activation,
        normalizer="b_pre" if mean.any() else "none",
        metadata=metadata,
    )
    return config, tensors


def _encoded_layers(described: Described, layers: int) -> list[int]:
    encoded = described.get("encoder_layers")
    if encoded is None:
        return list(range(layers))
    if not isinstance(encoded, list) or not all(isinstance(layer, int) and 0 <= layer < layers for layer in encoded):
        raise ValueError(
            f"encoder_layers in {described.path} is {shown(encoded)}: layers of 0 to {layers - 1} expected"
        )
    return encoded


def _normalizer(held: Weights, layers: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, the factor on the way in, the factor on the way back, all `[layers, d]`."""
    ones = torch.ones(layers, d, dtype=torch.float64)
    scaled = "activation_global_scale" in held
    if "activation_mean" not in held:
        return ones * 0, ones, ones
    t = held.take({"activation_mean": (layers, d), "activation_std": (layers, d)})
    mean, std = t["activation_mean"].double(), t["activation_std"].double()
    if mean.isnan().any() or std.isnan().any():
        return ones * 0, ones, ones
    if not scaled:
        raise ValueError(f"{held.path} has activation_mean but no activation_global_scale: it is damaged")
    stored = held.take({"activation_global_scale": (layers,)})["activation_global_scale"].double()
    if (stored == 1).all():
        return mean, 1 / (std + EPS), std + EPS
    scale = stored.unsqueeze(-1) * ones
    return mean, scale, 1 / (scale + EPS)


def _code_scale(decoder: Tensor, normalization: str, described: Described) -> Tensor:
    """nu, `[n]`, of `decoder [L, n, d]`."""
    norms = torch.linalg.vector_norm(decoder, dim=2, dtype=torch.float64)
    summed, whole = norms.sum(0), torch.linalg.vector_norm(norms, dim=0)
    if normalization == "crosscoder":
        return summed
    if normalization == "sae":
        return whole
    if normalization == "mixed":
        alphas = [number(described.path, described, f"code_normalization_alpha_{name}", None) for name in ("sae", "cc")]
        alpha_sae, alpha_cc = (default if a is None else a for a, default in zip(alphas, (1.0, 0.1), strict=True))
        return alpha_sae * whole + alpha_cc * summed
    return torch.ones_like(summed)


FORMAT = Format(NAME, TITLE, (WEIGHTS, CONFIG), detect, read)
