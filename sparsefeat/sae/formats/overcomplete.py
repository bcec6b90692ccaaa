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

from pathlib import Path

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Weights, names_in, shown, weights
from sparsefeat.sae.formats.fold import wide
from sparsefeat.sae.formats.foreign_config import config_of
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "overcomplete", "overcomplete (state dict)"
DICTIONARIES = ("dictionary._weights", "dictionary.Relax")
LINEAR, NORM = "encoder.final_block.0", "encoder.final_block.1"
BATCH_NORM_EPS = 1e-5  # torch.nn.BatchNorm1d's


def detect(place: Path) -> bool:
    return place.is_file() and not names_in(place).isdisjoint(DICTIONARIES)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with weights(place) as held:
        return _read(given, held)


def _read(given: Given, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    place = held.path
    refused = next((key for key in held if key == "Q" or "_blocks." in key), None)
    if refused is not None:
        raise ValueError(f"{place} has {refused}: only overcomplete's SAEs with a linear encoder can be read")
    W_dec = _dictionary(held)
    n, d = W_dec.shape
    W_enc, b_enc = _encoder(held, W_dec)
    zeros = W_dec.new_zeros(d)
    tensors = one_bias(W_enc, b_enc, W_dec, zeros)
    if "thresholds" in held:
        stored = held.take({"thresholds": (n,)})["thresholds"]
        thresholds = stored.to(wide(stored.dtype)).exp()
        # What reaches its threshold is active there, what exceeds it here: the number just below gives the same.
        tensors["threshold"] = torch.nextafter(thresholds, torch.zeros_like(thresholds))
        return SAEConfig(int(d), int(n), activation="jumprelu", normalizer="none"), tensors
    if given.k is None:
        raise ValueError(
            f"{place} is a state dict of overcomplete, which does not hold k: pass the k of training, "
            f"load_sae(…, k=), or k={n} for an SAE without a selection"
        )
    return config_of(place, d_model=int(d), n_latents=int(n), k=given.k, normalizer="none"), tensors


def _dictionary(held: Weights) -> Tensor:
    if "dictionary.Relax" in held:
        n, d = held.matrix("dictionary.Relax")
        p = held.matrix("dictionary.W")[1]
        t = held.take({"dictionary.Relax": (n, d), "dictionary.W": (n, p), "dictionary.C": (p, d)})
        dtype = wide(t["dictionary.Relax"].dtype)
        dictionary = t["dictionary.W"].to(dtype) @ t["dictionary.C"].to(dtype) + t["dictionary.Relax"].to(dtype)
    else:
        name = "dictionary._weights"
        if held.shape(name) is None or len(held.shape(name) or ()) != 2:
            raise ValueError(
                f"{held.path} has no matrix {name} (it has {shown(sorted(held))}): it was not written by overcomplete"
            )
        dictionary = held.take({name: held.matrix(name)})[name]
    if "dictionary.multiplier" in held:
        factor = held.take({"dictionary.multiplier": ()})["dictionary.multiplier"].double().exp()
        dtype = wide(dictionary.dtype)
        dictionary = dictionary.to(dtype) * factor.to(dtype)
    return dictionary


def _encoder(held: Weights, dictionary: Tensor) -> tuple[Tensor, Tensor]:
    n, d = dictionary.shape
    if f"{LINEAR}.weight" in held:
        t = held.take({f"{LINEAR}.weight": (n, d), f"{LINEAR}.bias": (n,)})
        weight, bias = t[f"{LINEAR}.weight"], t[f"{LINEAR}.bias"]
        if f"{NORM}.weight" not in held:
            return weight, bias
        if f"{NORM}.running_var" not in held:
            raise ValueError(
                f"{held.path} has a layer norm in its encoder: only a batch norm can be folded into one layer"
            )
        names = ("weight", "bias", "running_mean", "running_var")
        norm = held.take({f"{NORM}.{name}": (n,) for name in names})
        gain, shift, mean, variance = (norm[f"{NORM}.{name}"].double() for name in names)
        factor = gain / (variance + BATCH_NORM_EPS).sqrt()
        dtype = wide(weight.dtype)
        folded = (bias.double() - mean) * factor + shift
        return weight.to(dtype) * factor.to(dtype).unsqueeze(1), folded.to(dtype)
    tied = [key for key in held if key.startswith("encoder.tied_to.")]
    if tied:
        held.asked |= set(tied)  # the dictionary once more
        weight = dictionary
    elif "encoder.weight" in held:
        weight = held.take({"encoder.weight": (n, d)})["encoder.weight"]
    else:
        raise ValueError(f"{held.path} has no encoder: overcomplete's pursuit SAEs cannot be read")
    if "encoder.bias" not in held:
        return weight, weight.new_zeros(n)
    return weight, held.take({"encoder.bias": (n,)})["encoder.bias"]


FORMAT = Format(NAME, TITLE, (), detect, read)
