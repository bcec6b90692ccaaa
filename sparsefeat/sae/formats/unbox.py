"""sdxl-unbox, Concept Steerers and ItD, which share one SAE: `config.json` and `state_dict.pth`.

`state_dict.pth` holds `{"state_dict": {...}}`, weights alone, with

| tensor | shape | |
|---|---|---|
| encoder.weight | [n, d] | |
| decoder.weight | [d, n] | lies in memory column by column |
| pre_bias, latent_bias | [d], [n] | the first subtracted from the input and added to the output |
| stats_last_nonzero | [n] int64 | of the training |

`config.json`: `n_dirs_local` is n, `d_model`, `k`; `auxk` and `dead_steps_threshold` are of the training, and `auxk_coef`
is only in Concept Steerers'. The k largest pre-activations are selected, then comes ReLU. sdxl-unbox has `mean.pt` and
`std.pt` [n] beside them: of every latent's activations, where they are not zero.

The published folders are called `BLOCK_k10_hidden5120_auxk256_bs4096_lr0.0001…/final` (or a step in the place of final):
that is where the hookpoint comes from. SAEmnesia (arXiv 2509.21379) has `cfg.json` and `sae.safetensors` or
`state_dict.pth` with the same keys and these tensors or SAeUron's, in a folder that is called after the hookpoint. UNet blocks were trained on what a block adds (diff), text encoders' layers on
their output. Concept Steerers' training compared the reconstruction with `x - pre_bias` instead of x (`trained_against`
in the metadata): what is missing from `sae(x)` then is `pre_bias` once more.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, described, read_json, weights
from sparsefeat.sae.formats.fold import cannot_express, check_affine, encoder_bias
from sparsefeat.sae.formats.folder_names import hookpoint_called
from sparsefeat.sae.formats.foreign_config import config_of, k_of, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "unbox", "sdxl-unbox, Concept Steerers, ItD, SAEmnesia"
CONFIG, WEIGHTS = "config.json", "state_dict.pth"
STATISTICS = {"mean.pt": "mean_nonzero", "std.pt": "std_nonzero"}
MIXED_CONFIG, MIXED_WEIGHTS = "cfg.json", "sae.safetensors"  # SAEmnesia has these with the same keys
HARMLESS = frozenset({"batch_topk", "sample_topk", "multi_topk", "normalize_decoder", "expansion_factor"})
TRAINING = ("auxk", "auxk_coef", "dead_steps_threshold")


def detect(place: Path) -> bool:
    if not place.is_dir():
        return False
    if (place / WEIGHTS).exists():
        return True
    return any((place / name).exists() and "n_dirs_local" in read_json(place / name) for name in (CONFIG, MIXED_CONFIG))


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    config = MIXED_CONFIG if (place / MIXED_CONFIG).exists() and not (place / CONFIG).exists() else CONFIG
    file = MIXED_WEIGHTS if (place / MIXED_WEIGHTS).exists() and not (place / WEIGHTS).exists() else WEIGHTS
    with described(place / config, HARMLESS) as values, weights(place / file, inside="state_dict") as held:
        return _read(place, given, values, held)


def _read(place: Path, given: Given, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = values.path
    n, d = whole_number(path, values, "n_dirs_local"), whole_number(path, values, "d_model")
    statistics = {file: name for file, name in STATISTICS.items() if (place / file).exists()}
    metadata = {name: values[name] for name in TRAINING if values.get(name) is not None}
    if "auxk_coef" in values:
        metadata["trained_against"] = "x - b_pre"
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation="topk",
        k=k_of(path, values, given.k),
        statistics=tuple(statistics.values()),
        hookpoint=_hookpoint(place),
        metadata=metadata,
    )
    if "W_dec" in held:  # SAEmnesia's, under the names of SAeUron's
        t = held.take({"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)})
        b_enc, W_dec, bias = t["encoder.bias"], t["W_dec"], t["b_dec"]
    else:
        t = held.take({"encoder.weight": (n, d), "decoder.weight": (d, n), "pre_bias": (d,), "latent_bias": (n,)})
        b_enc, W_dec, bias = t["latent_bias"], t["decoder.weight"].T.contiguous(), t["pre_bias"]
    tensors = one_bias(t["encoder.weight"], b_enc, W_dec, bias)
    for file, name in statistics.items():
        with weights(place / file, alone=file) as statistic:
            # A latent that was never active has no mean.
            tensors[f"statistic_{name}"] = statistic.take({file: (n,)})[file].nan_to_num(nan=0.0)
    return config, tensors


def _hookpoint(place: Path) -> str | None:
    for folder in (place.absolute(), place.absolute().parent):
        found = re.match(r"(?P<block>[A-Za-z_]\w*(\.\w+)+)_k\d+_hidden\d+", folder.name)
        if found:
            block = found["block"]
            return f"{block}:diff" if block.startswith("unet.") else block
    return hookpoint_called(place.absolute().name)


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """What is subtracted from the input becomes `b_out`, and the encoder's bias makes up for it."""
    if config.activation != "topk":
        raise cannot_express(TITLE, config)
    check_affine(TITLE, config)
    if config.transcoder:
        raise ValueError(f"{TITLE} cannot express a transcoder: save in the native format instead")
    t = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    n = config.n_latents
    state = {
        "encoder.weight": t["W_enc"].contiguous(),
        "decoder.weight": t["W_dec"].contiguous().T,
        "pre_bias": t["b_out"],
        "latent_bias": encoder_bias(t, t["b_out"]),
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
    }
    # The class is built from all of these, and trains without an auxiliary loss where auxk is null.
    training: dict[str, Any] = {"auxk": None, "dead_steps_threshold": 0}
    training |= {name: config.metadata[name] for name in TRAINING if name in config.metadata}
    described = {"n_dirs_local": n, "d_model": config.d_model, "k": config.k, **training}
    torch.save({"state_dict": {name: tensor.clone() for name, tensor in state.items()}}, folder / WEIGHTS)
    for file, name in STATISTICS.items():
        if name in config.statistics:
            torch.save(t[f"statistic_{name}"].clone(), folder / file)
    (folder / CONFIG).write_text(json.dumps(described) + "\n", encoding="utf-8")


FORMAT = Format(NAME, TITLE, (CONFIG, WEIGHTS), detect, read, write, optional=tuple(STATISTICS))
