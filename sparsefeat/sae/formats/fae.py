"""fae's FLUX SAEs (arXiv 2505.24360), after `python -m sparsefeat.sae.formats.convert_fae FOLDER OUT`.

They are published as orbax PyTrees, which PyTorch programs cannot read; the conversion writes the tensors that matter
under their own names into `fae.safetensors`, and the training's config into `fae.json`.

| tensor | shape | |
|---|---|---|
| W_enc, W_dec | (d, n), (n, d) | in the normalised space; `b_mid` is stored by training and never used |
| b_pre, b_post | (d) | u - b_post + b_pre is encoded, b_post added after decoding |
| whitening_matrix | (d, d) | u = clip((x P - mean) / std): normaliser "pca"; std is 1e-3 at least |
| feature_means, feature_square_means | (d) | of x P, so that std² = square mean - mean²; of x itself without whitening |
| avg_norm | () | of before the standardising: u = clip(x sqrt(d) / avg_norm) |

Which normaliser it is, the config says, where it is young enough: `use_pca` and `standardize`; without whitening it is
"affine". The k largest pre-activations are kept, whatever their sign. `site` of the config becomes the hookpoint with
`seq_mode` img, or txt (the text of a joint block); of an SAE of both, the default, the stream is left to the caller.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, read_json, shown, weights
from sparsefeat.sae.formats.fold import wide
from sparsefeat.sae.formats.foreign_config import config_of, flag, k_of, number
from sparsefeat.sae.formats.format import Format, Given

NAME, TITLE = "fae", "FLUX SAEs (fae)"
WEIGHTS, CONFIG = "fae.safetensors", "fae.json"
STD_FLOOR = 1e-3
ORTHONORMAL = 1e-2
SITES = {"double": "transformer.transformer_blocks", "single": "transformer.single_transformer_blocks"}
HARMLESS = frozenset({"b_mid", "avg_norm", "whitening_matrix", "feature_means", "feature_square_means"})
# The classes' own defaults, for keys that an older config.json lacks.
DEFAULT_CLIP = 10.0


def detect(place: Path) -> bool:
    return (place / WEIGHTS).exists()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    # The training's config has some hundred keys of the run; those asked for here are what says what the weights mean.
    described = Described(place / CONFIG, read_json(place / CONFIG))
    with weights(place / WEIGHTS, HARMLESS) as held:
        return _read(given, described, held)


def _read(given: Given, described: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = described.path
    if held.shape("W_dec") is None or len(held.shape("W_dec") or ()) != 2:
        raise ValueError(
            f"{held.path} has no matrix W_dec (it has {shown(sorted(held))}): convert the checkpoint again"
        )
    n, d = held.matrix("W_dec")
    t = held.take({"W_enc": (d, n), "W_dec": (n, d), "b_pre": (d,), "b_post": (d,)})
    if given.k is None and described.get("k") is None:
        raise ValueError(f"{path} has no k: pass the k of training, load_sae(…, k=)")
    normalizer, normalizing = _normalizer(described, held, d)
    dtype = wide(t["b_post"].dtype)
    tensors = {
        "W_enc": t["W_enc"].T.contiguous(),
        "b_enc": t["W_enc"].new_zeros(n),
        "W_dec": t["W_dec"],
        "b_pre": t["b_post"].to(dtype) - t["b_pre"].to(dtype),
        "b_out": t["b_post"],
        **normalizing,
    }
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation="raw_topk",
        k=k_of(path, described, given.k),
        normalizer=normalizer,
        clip=number(path, described, "clip_data", DEFAULT_CLIP),
        hookpoint=_hookpoint(described),
        metadata={name: described[name] for name in ("site", "seq_mode") if name in described},
    )
    return config, tensors


def _normalizer(described: Described, held: Weights, d: int) -> tuple[str, dict[str, Tensor]]:
    """Its name and tensors: by what the config says, which is younger than the first checkpoints."""
    path = described.path
    whitens = flag(path, described, "use_pca", default="whitening_matrix" in held)
    if not flag(path, described, "standardize", default=True):
        raise ValueError(f"standardize in {path} is False: only SAEs of standardised activations can be read")
    said = described.get("standardize") is True
    if not whitens and not said and "feature_means" in held and "avg_norm" in held:
        raise ValueError(
            f"{held.path} has feature_means and avg_norm and {path} does not say which: write standardize true into it for "
            "the means, or take them out for the average norm"
        )
    if not whitens and not said and "feature_means" not in held:
        norm = held.take({"avg_norm": ()})["avg_norm"].double() / math.sqrt(d)
        return "affine", {
            "pca_mean": torch.zeros(d, dtype=torch.float32),
            "pca_std": norm.expand(d).float().contiguous(),
        }
    statistics = held.take({"feature_means": (d,), "feature_square_means": (d,)})
    mean = statistics["feature_means"]
    variance = statistics["feature_square_means"].double() - mean.double().square()
    std = variance.clamp(min=0).sqrt().clamp(min=STD_FLOOR).to(wide(mean.dtype))
    if not whitens:
        return "affine", {"pca_mean": mean, "pca_std": std}
    basis = held.take({"whitening_matrix": (d, d)})["whitening_matrix"]
    product = basis.double().T @ basis.double()
    product.diagonal().sub_(1)
    off = float(product.abs().max())
    if not off < ORTHONORMAL:
        raise ValueError(
            f"whitening_matrix in {held.path} is not orthonormal (off by {off:.3g}): its transpose would not undo it, "
            "convert the checkpoint again"
        )
    return "pca", {"pca_basis": basis, "pca_mean": mean, "pca_std": std}


def _hookpoint(described: Described) -> str | None:
    """None where it was trained on image and text together, "both", which is also the program's default."""
    site, stream = described.get("site"), {"img": "", "txt": ":text"}.get(str(described.get("seq_mode", "both")))
    if stream is None or not isinstance(site, list) or len(site) != 2:
        return None
    block, number = site
    if not isinstance(block, str) or block not in SITES or isinstance(number, bool) or not isinstance(number, int):
        return None
    return f"{SITES[block]}.{number}:output{stream}"


FORMAT = Format(NAME, TITLE, (WEIGHTS, CONFIG), detect, read)
