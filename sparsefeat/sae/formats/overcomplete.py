"""overcomplete: a state dict in one file, `torch.save(sae.eval().state_dict(), "sae.pt")`, or the same in safetensors.

The library has no format of its own, and a pickled module is refused: it can run code. Neither k nor the class is in a
state dict, so k must be given; a plain SAE, which keeps all that is positive, is `k=n_latents`, and one with a parameter
`thresholds` (JumpSAE) needs none. BatchTopKSAE's running threshold is not saved either: with k it selects k a row.

| tensor | shape | |
|---|---|---|
| encoder.final_block.0.weight, .bias | (n, d), (n) | the default encoder; `encoder.final_block.1.*` is a batch norm, folded |
| encoder.weight, .bias | (n, d), (n) | after `.untied()`; after `.tied()` only the bias, if any |
| dictionary._weights | (n, d) | normalised by `.eval()`; taken as it is |
| dictionary.W, .C, .Relax | (n, p), (p, d), (n, d) | archetypal: W C + Relax |
| dictionary.multiplier | () | its exponential multiplies the dictionary |
| thresholds | (n) | JumpSAE: their exponentials, reached or exceeded |

Encoders of more than one layer, or with a layer norm, attention or convolutions, and QSAE, MpSAE (which picks by value,
not by magnitude) and OMPSAE are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats.format import Format, Given, check_tensors, mentions, read_torch

NAME, TITLE = "overcomplete", "overcomplete (state dict)"
DICTIONARIES = ("dictionary._weights", "dictionary.Relax")
LINEAR, NORM = "encoder.final_block.0", "encoder.final_block.1"
BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm1d's


def detect(place: Path) -> bool:
    if not place.is_file():
        return False
    if place.suffix == ".safetensors":
        try:
            with safe_open(place, framework="pt") as file:
                return any(name in file.keys() for name in DICTIONARIES)  # noqa: SIM118
        except SafetensorError:
            return False
    return any(mentions(place, name) for name in (*DICTIONARIES, "overcomplete.sae"))


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    state = _state(place)
    refused = next((key for key in state if key == "Q" or "_blocks." in key), None)
    if refused is not None:
        raise ValueError(f"{place} has {refused}: only overcomplete's SAEs with a linear encoder can be read")
    W_dec = _dictionary(place, state)
    n, d = W_dec.shape
    W_enc, b_enc = _encoder(place, state, W_dec)
    zeros = W_dec.new_zeros(d)
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_pre": zeros, "b_out": zeros}
    if "thresholds" in state:
        thresholds = check_tensors(place, state, {"thresholds": (n,)})["thresholds"].exp()
        # What reaches its threshold is active there, what exceeds it here: the number just below gives the same.
        tensors["threshold"] = torch.nextafter(thresholds, torch.zeros_like(thresholds))
        return SAEConfig(int(d), int(n), activation="jumprelu", normalizer="none"), tensors
    if given.k is None:
        raise ValueError(
            f"{place} is a state dict of overcomplete, which does not hold k: pass the k of training, "
            f"load_sae(…, k=), or k={n} for an SAE without a selection"
        )
    return SAEConfig(int(d), int(n), k=given.k, normalizer="none"), tensors


def _state(place: Path) -> Mapping[str, Any]:
    if place.suffix != ".safetensors":
        state = read_torch(place)
        if not isinstance(state, Mapping):
            raise ValueError(f"{place} holds a {type(state).__name__}: a state dict was expected")
        return state
    try:
        with safe_open(place, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{place} is damaged ({error}): copy or download it again") from None


def _matrix(place: Path, state: Mapping[str, Any], name: str) -> Tensor:
    tensor = state.get(name)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        raise ValueError(
            f"{place} has no matrix {name} (it has {sorted(map(str, state))}): it was not written by overcomplete"
        )
    return check_tensors(place, state, {name: tuple(tensor.shape)})[name]


def _dictionary(place: Path, state: Mapping[str, Any]) -> Tensor:
    if "dictionary.Relax" in state:
        relaxed = _matrix(place, state, "dictionary.Relax")
        n, d = relaxed.shape
        p = _matrix(place, state, "dictionary.W").shape[1]
        t = check_tensors(place, state, {"dictionary.W": (n, p), "dictionary.C": (p, d)})
        dictionary = t["dictionary.W"] @ t["dictionary.C"] + relaxed
    else:
        dictionary = _matrix(place, state, "dictionary._weights")
    if "dictionary.multiplier" in state:
        dictionary = (
            dictionary * check_tensors(place, state, {"dictionary.multiplier": ()})["dictionary.multiplier"].exp()
        )
    return dictionary


def _encoder(place: Path, state: Mapping[str, Any], dictionary: Tensor) -> tuple[Tensor, Tensor]:
    n, d = dictionary.shape
    if f"{LINEAR}.weight" in state:
        t = check_tensors(place, state, {f"{LINEAR}.weight": (n, d), f"{LINEAR}.bias": (n,)})
        weight, bias = t[f"{LINEAR}.weight"], t[f"{LINEAR}.bias"]
        if f"{NORM}.weight" not in state:
            return weight, bias
        if f"{NORM}.running_var" not in state:
            raise ValueError(f"{place} has a layer norm in its encoder: only a batch norm can be folded into one layer")
        names = ("weight", "bias", "running_mean", "running_var")
        norm = check_tensors(place, state, {f"{NORM}.{name}": (n,) for name in names})
        gain, shift, mean, variance = (norm[f"{NORM}.{name}"].double() for name in names)
        factor = gain / (variance + BATCH_NORM_EPS).sqrt()
        folded = (bias.double() - mean) * factor + shift
        return (weight.double() * factor.unsqueeze(1)).to(weight.dtype), folded.to(bias.dtype)
    if any(key.startswith("encoder.tied_to.") for key in state):
        weight = dictionary
    elif "encoder.weight" in state:
        weight = check_tensors(place, state, {"encoder.weight": (n, d)})["encoder.weight"]
    else:
        raise ValueError(f"{place} has no encoder: overcomplete's pursuit SAEs cannot be read")
    if "encoder.bias" not in state:
        return weight, weight.new_zeros(n)
    return weight, check_tensors(place, state, {"encoder.bias": (n,)})["encoder.bias"]


FORMAT = Format(NAME, TITLE, (), detect, read)
