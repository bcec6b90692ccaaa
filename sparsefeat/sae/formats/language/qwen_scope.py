"""Qwen Scope: one file a layer, `layerN.sae.pt`, in a repository whose name says the rest, `SAE-Res-MODEL-W32K-L0_50`.

`W_enc` (n, d), `W_dec` (d, n), `b_enc`, `b_dec`; the k largest pre-activations of the residual stream after layer N, then
ReLU; nothing is subtracted from the input. k stands in the repository's name alone.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import names_in, weights
from sparsefeat.sae.formats.foreign_config import config_of
from sparsefeat.sae.formats.format import Format, Given, one_bias
from sparsefeat.sae.formats.language.places import said_by

NAME, TITLE = "qwen_scope", "Qwen Scope"
FILE = re.compile(r"layer(\d+)\.sae\.pt")


def detect(place: Path) -> bool:
    return place.is_file() and FILE.fullmatch(place.name) is not None and {"W_enc", "W_dec"} <= names_in(place)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    said = re.search(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)", said_by(place))
    layer = FILE.fullmatch(place.name)
    k = given.k if given.k is not None else int(said[3]) if said else None
    if k is None or layer is None:
        raise ValueError(f"{place} does not hold k, and no folder above it is called …-L0_K: pass it, load_sae(…, k=)")
    with weights(place) as held:
        n, d = held.matrix("W_enc")
        t = held.take({"W_enc": (n, d), "W_dec": (d, n), "b_enc": (n,), "b_dec": (d,)})
    if said and n != 1024 * int(said[2]):
        raise ValueError(f"{place} has {n} latents and lies in {said[0]}: it belongs into another folder")
    config = config_of(
        place,
        d_model=d,
        n_latents=n,
        activation="topk",
        k=k,
        normalizer="none",
        hookpoint=f"model.layers.{layer[1]}",
        base_model=f"Qwen/{said[1]}" if said else None,
    )
    return config, one_bias(t["W_enc"], t["b_enc"], t["W_dec"].T, t["b_dec"], subtracted=False)


FORMAT = Format(NAME, TITLE, (), detect, read)
