"""EleutherAI's sparsify and its ancestor sae, and SAeUron, which took over the format: `cfg.json`, `sae.safetensors`.

| tensor | shape | |
|---|---|---|
| encoder.weight, encoder.bias | [n, d], [n] | |
| W_dec | [n, d] | the same orientation as the encoder's |
| b_dec | [d] | added to the output; subtracted from the input, unless `transcode` |
| W_skip | [d, d] | with `skip_connection`: `x W_skip^T` is added to the output, x as it came |

| cfg.json | meaning |
|---|---|
| d_in, num_latents, expansion_factor | `num_latents` 0 stands for `d_in * expansion_factor` |
| activation, k | "topk" (also where there is no such key) or "groupmax"; ReLU comes before either |
| transcode | the SAE maps a module's input to its output |
| signed | only in sae: the k largest magnitudes, no ReLU; today's sparsify ignores the key |
| batch_topk | only SAeUron: how it was trained; at inference it keeps k a row like the others |
| sample_topk | only SAeUron: as batch_topk, over one image's rows |
| input_unit_norm | only SAeUron: every row standardised, see `sparsefeat.sae.normalizers` |

The folder is called after the hookpoint, or `seedN` below that; the run's `config.json` above it names the model.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, described, read_json, shown, weights
from sparsefeat.sae.formats.fold import cannot_express, encoder_bias
from sparsefeat.sae.formats.folder_names import hookpoint_called
from sparsefeat.sae.formats.foreign_config import config_of, flag, k_of, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "sparsify", "EleutherAI sparsify, SAeUron"
CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"

# What the SAEConfig says in its own words; the rest of cfg.json is kept as metadata.
TRANSLATED = {"d_in", "num_latents", "k", "activation", "transcode", "skip_connection", "signed", "batch_topk"}
TRANSLATED |= {"input_unit_norm"}
# How the SAE was trained: its weights mean the same either way.
HARMLESS = frozenset({"normalize_decoder", "multi_topk", "sample_topk", "expansion_factor"})


def detect(place: Path) -> bool:
    """SAELens has a `cfg.json` too; its weights have another name, and without weights its config another width."""
    if not (place / CONFIG).exists() or (place / "sae_weights.safetensors").exists():
        return False
    return not {"d_sae", "n_dirs_local"} & set(read_json(place / CONFIG))


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with described(place / CONFIG, HARMLESS) as values, weights(place / WEIGHTS) as held:
        return _read(place, given, values, held)


def _read(place: Path, given: Given, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = values.path
    d = whole_number(path, values, "d_in")
    n = whole_number(path, values, "num_latents", at_least=0) if "num_latents" in values else 0
    n = n or d * whole_number(path, values, "expansion_factor")
    transcode, skip = flag(path, values, "transcode"), flag(path, values, "skip_connection")
    standardized = flag(path, values, "input_unit_norm")
    hookpoint, base_model = _where(place)
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation=_activation(path, values),
        k=k_of(path, values, given.k),
        normalizer="standardize" if standardized else "none" if transcode else "b_pre",
        transcoder=transcode,
        skip=skip,
        hookpoint=hookpoint,
        base_model=base_model,
        metadata={name: value for name, value in values.plain.items() if name not in TRANSLATED},
    )
    shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "W_dec": (n, d), "b_dec": (d,)}
    if skip:
        shapes["W_skip"] = (d, d)
    t = held.take(shapes)
    if not skip and "W_skip" in held:
        raise ValueError(
            f"{held.path} has a W_skip but skip_connection in {path} is not true: correct the one or the other"
        )
    tensors = one_bias(t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"], subtracted=not transcode)
    if skip:
        tensors["W_skip"] = t["W_skip"]
    if config.activation == "batch_topk":
        tensors["threshold"] = t["b_dec"].new_tensor(-1.0)  # unset: none is stored
    return config, tensors


def _activation(path: Path, values: Mapping[str, Any]) -> str:
    activation = values.get("activation", "topk")
    if activation not in ("topk", "groupmax"):
        raise ValueError(f"activation in {path} is {shown(activation)}: topk and groupmax are what sparsify has")
    signed, batch = flag(path, values, "signed"), flag(path, values, "batch_topk")
    if (signed or batch) and (activation == "groupmax" or (signed and batch)):
        raise ValueError(f"{path} asks for {activation!r}, signed {signed} and batch_topk {batch}: only one may be")
    return "signed_topk" if signed else "batch_topk" if batch else activation


def _where(place: Path) -> tuple[str | None, str | None]:
    """Hookpoint and base model, from the names above the files; a folder that was renamed says nothing."""
    folder = place.absolute()
    if re.fullmatch(r"seed\d+", folder.name):
        folder = folder.parent
    run = folder.parent / "config.json"
    model = None
    if run.is_file():
        with contextlib.suppress(ValueError, OSError):  # somebody else's file
            model = read_json(run).get("model")
    return hookpoint_called(folder.name), model if isinstance(model, str) and model else None


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """For the package to read: SAeUron's keys and `signed`, which it would pass over, are refused.

    Biases are folded: what is subtracted from the input becomes `b_dec`, and the encoder's bias makes up for it.
    """
    if config.activation not in ("topk", "groupmax"):
        raise cannot_express(TITLE, config)
    if config.normalizer not in ("none", "b_pre"):
        raise ValueError(
            f"{TITLE} cannot express normalizer {config.normalizer!r}, which the package would ignore: save in the "
            "native format instead"
        )
    t = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    state = {
        "encoder.weight": t["W_enc"],
        "encoder.bias": encoder_bias(t, None if config.transcoder else t["b_out"]),
        "W_dec": t["W_dec"],
        "b_dec": t["b_out"],
    }
    if config.skip:
        state["W_skip"] = t["W_skip"]
    described = {
        "activation": config.activation,
        "expansion_factor": config.metadata.get("expansion_factor", 32),  # has no say where num_latents is given
        "normalize_decoder": config.metadata.get("normalize_decoder", False),
        "num_latents": config.n_latents,
        "k": config.k,
        "multi_topk": config.metadata.get("multi_topk", False),
        "skip_connection": config.skip,
        "transcode": config.transcoder,
        "d_in": config.d_model,
    }
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(described) + "\n", encoding="utf-8")


FORMAT = Format(NAME, TITLE, (CONFIG, WEIGHTS), detect, read, write)
