"""fae's FLUX SAEs (arXiv 2505.24360), after `python -m sparsefeat.sae.formats.convert_fae FOLDER OUT`.

They are published as orbax PyTrees, which PyTorch programs cannot read; the conversion writes the tensors that matter
under their own names into `fae.safetensors`, and the training's config into `fae.json`.

| tensor | shape | |
|---|---|---|
| W_enc, W_dec | (d, n), (n, d) | in the normalised space; `b_mid` is stored by training and never used |
| b_pre, b_post | (d) | u - b_post + b_pre is encoded, b_post added after decoding |
| whitening_matrix | (d, d) | u = clip((x P - mean) / std): normaliser "pca"; std is 1e-3 at least |
| feature_means, feature_square_means | (d) | of x P, so that std² = square mean - mean² |
| avg_norm | () | of before the whitening: u = clip(x sqrt(d) / avg_norm), the same with P = 1 and mean 0 |

The k largest pre-activations are kept, whatever their sign. `site` of the config becomes the hookpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats.format import Format, Given, read_json, read_safetensors

NAME, TITLE = "fae", "FLUX SAEs (fae)"
WEIGHTS, CONFIG = "fae.safetensors", "fae.json"
STD_FLOOR = 1e-3
ORTHONORMAL = 1e-2
SITES = {"double": "transformer.transformer_blocks", "single": "transformer.single_transformer_blocks"}
# The classes' own defaults, for keys that an older config.json lacks.
DEFAULT_CLIP = 10.0


def detect(place: Path) -> bool:
    return (place / WEIGHTS).is_file()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    described = read_json(place / CONFIG)
    path = place / WEIGHTS
    n, d, whitened = _header(path)
    shapes = {"W_enc": (d, n), "W_dec": (n, d), "b_pre": (d,), "b_post": (d,)}
    if whitened:
        shapes |= {"whitening_matrix": (d, d), "feature_means": (d,), "feature_square_means": (d,)}
    else:
        shapes["avg_norm"] = ()
    t = read_safetensors(path, shapes)
    k = given.k if given.k is not None else described.get("k")
    if k is None:
        raise ValueError(f"{place / CONFIG} has no k: pass the k of training, load_sae(…, k=)")
    if described.get("standardize") is False:
        raise ValueError(f"standardize in {place / CONFIG} is False: only SAEs of standardised activations can be read")
    basis, mean, std = _normalizer(path, t, d)
    tensors = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["W_enc"].new_zeros(n),
        "W_dec": t["W_dec"],
        "b_pre": t["b_post"] - t["b_pre"],
        "b_out": t["b_post"],
        "pca_basis": basis,
        "pca_mean": mean,
        "pca_std": std,
    }
    clip = described.get("clip_data", DEFAULT_CLIP)
    config = SAEConfig(
        d,
        n,
        activation="raw_topk",
        k=k,
        normalizer="pca",
        clip=None if clip is None else float(clip),
        hookpoint=_hookpoint(described.get("site")),
        metadata={name: described[name] for name in ("site", "seq_mode") if name in described},
    )
    return config, tensors


def _header(path: Path) -> tuple[int, int, bool]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = set(file.keys())
            shape = file.get_slice("W_dec").get_shape() if "W_dec" in keys else []
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): convert the checkpoint again") from None
    if len(shape) != 2:
        raise ValueError(f"{path} has no matrix W_dec (it has {sorted(keys)}): convert the checkpoint again")
    return shape[0], shape[1], "whitening_matrix" in keys


def _normalizer(path: Path, t: Mapping[str, Tensor], d: int) -> tuple[Tensor, Tensor, Tensor]:
    if "whitening_matrix" not in t:
        eye = torch.eye(d, dtype=t["W_dec"].dtype)
        return eye, eye.new_zeros(d), (t["avg_norm"] / math.sqrt(d)).expand(d).to(eye.dtype).contiguous()
    basis, mean = t["whitening_matrix"], t["feature_means"]
    product = basis.double().T @ basis.double()
    off = float((product - torch.eye(d, dtype=torch.float64)).abs().max())
    if not off < ORTHONORMAL:
        raise ValueError(
            f"whitening_matrix in {path} is not orthonormal (off by {off:.3g}): its transpose would not undo it, "
            "convert the checkpoint again"
        )
    variance = t["feature_square_means"].double() - mean.double().square()
    std = variance.clamp(min=0).sqrt().clamp(min=STD_FLOOR).to(mean.dtype)
    return basis, mean, std


def _hookpoint(site: Any) -> str | None:
    if isinstance(site, list) and len(site) == 2 and site[0] in SITES and isinstance(site[1], int):
        return f"{SITES[site[0]]}.{site[1]}:output"
    return None


FORMAT = Format(NAME, TITLE, (WEIGHTS, CONFIG), detect, read)
