"""Llama Scope (arXiv 2410.20526): `hyperparams.json`, and the weights in `checkpoints/final.safetensors`.

`encoder.weight` (n, d), `decoder.weight` (d, n), `encoder.bias`, `decoder.bias`; JumpReLU with one threshold. The SAE is
of activations times s = sqrt(d) / `dataset_average_activation_norm.in`, folded here into the weights; the threshold is
of the unscaled ones, s times it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, described, listed, shown, weights
from sparsefeat.sae.formats.fold import wide
from sparsefeat.sae.formats.foreign_config import config_of, flag, number, text, whole_number
from sparsefeat.sae.formats.format import Format, Given
from sparsefeat.sae.formats.language.places import place_called

NAME, TITLE = "llama_scope", "Llama Scope"
CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
BASE_MODEL = "meta-llama/Llama-3.1-8B"
UNIT = 1e-2  # norms this far from one would change what the threshold is compared with
HARMLESS = listed(
    "expansion_factor use_decoder_bias sae_pretrained_name_or_path strict_loading ste use_glu_encoder top_k "
    "decoder_exactly_fixed_norm decoder_bias_init_method sae_type tp_size"
)


def detect(place: Path) -> bool:
    return (place / CONFIG).exists()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with described(place / CONFIG, HARMLESS) as values, weights(place / WEIGHTS) as held:
        return _read(values, held)


def _read(values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = values.path
    d, n = whole_number(path, values, "d_model"), whole_number(path, values, "d_sae")
    norms = values.get("dataset_average_activation_norm")
    average = number(path, norms, "in", None) if isinstance(norms, Mapping) else None
    threshold = number(path, values, "jump_relu_threshold", None)
    if average is None or not average > 0 or threshold is None:
        raise ValueError(
            f"{path} has jump_relu_threshold {shown(threshold)} and dataset_average_activation_norm {shown(norms)}: two "
            "positive numbers were expected"
        )
    hook, out = values.get("hook_point_in"), values.get("hook_point_out")
    if out not in (None, hook):
        raise ValueError(f"hook_point_out in {path} is {shown(out)} and hook_point_in {shown(hook)}: SAEs can be read")
    kinds = text(path, values, "act_fn"), text(path, values, "norm_activation")
    if kinds[0] not in (None, "jumprelu") or kinds[1] not in (None, "dataset-wise", "inference"):
        raise ValueError(f"{path} has act_fn and norm_activation {shown(kinds)}: jumprelu and dataset-wise can be read")
    if flag(path, values, "apply_decoder_bias_to_pre_encoder") or flag(path, values, "use_glu_encoder"):
        raise ValueError(f"{path} has a bias before the encoder or a gated encoder: the published SAEs have neither")
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
    t = held.take(shapes)
    if flag(path, values, "sparsity_include_decoder_norm"):
        lengths = torch.linalg.vector_norm(t["decoder.weight"], dim=0, dtype=torch.float64)
        if not torch.allclose(lengths, torch.ones_like(lengths), rtol=UNIT, atol=0):
            raise ValueError(
                f"sparsity_include_decoder_norm in {path} is true and {held.path} has decoder rows of norms "
                f"{lengths.min():.3g} to {lengths.max():.3g}: the published SAEs have unit rows"
            )
    scale = math.sqrt(d) / average
    dtype = wide(t["encoder.weight"].dtype)
    b_out = t["decoder.bias"].to(dtype) / scale
    tensors = {
        "W_enc": t["encoder.weight"].to(dtype) * scale,
        "b_enc": t["encoder.bias"],
        "W_dec": t["decoder.weight"].T.to(dtype).contiguous() / scale,
        "b_pre": torch.zeros_like(b_out),
        "b_out": b_out,
        "threshold": torch.full((n,), threshold * scale, dtype=dtype),
    }
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation="jumprelu",
        normalizer="none",
        hookpoint=place_called(hook),
        base_model=BASE_MODEL,
        metadata={"hook_point_in": hook, "scale": scale},
    )
    return config, tensors


FORMAT = Format(NAME, TITLE, (CONFIG, WEIGHTS), detect, read)
