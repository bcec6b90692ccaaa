"""BioNeMo's SAEs: one `.pt` file with `model_state_dict`, `model_config`, `input_dim` and `hidden_dim`.

`encoder.weight` (n, d), `decoder.weight` (d, n), `pre_bias` (d, subtracted from the input and added to the output),
`latent_bias` (n), `stats_last_nonzero`; `model_config` has `top_k` (or `k`): the k largest, then ReLU; without one, ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, read_weights, shown, weights
from sparsefeat.sae.formats.foreign_config import config_of, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "bionemo", "BioNeMo"
STATE = "model_state_dict"
HARMLESS = frozenset(
    {"input_dim", "hidden_dim", "expansion_factor", "dead_tokens_threshold", "auxk", "normalize_decoder"}
)


def detect(place: Path) -> bool:
    if not place.is_file() or place.suffix not in (".pt", ".pth"):
        return False
    try:
        held = read_weights(place)
    except (ValueError, OSError):
        return False
    return isinstance(held, Mapping) and {STATE, "input_dim", "hidden_dim"} <= set(held)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with weights(place, inside=STATE) as held:
        stored = held.around.get("model_config")
        if stored is not None and not isinstance(stored, Mapping):
            raise ValueError(f"model_config in {place} is {shown(stored)}: names and values were expected")
        values = Described(place, {str(name): value for name, value in (stored or {}).items()})
        found = _read(given, values, held)
    values.check(HARMLESS)
    return found


def _read(given: Given, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = held.path
    d, n = whole_number(path, held.around, "input_dim"), whole_number(path, held.around, "hidden_dim")
    shapes = {"encoder.weight": (n, d), "decoder.weight": (d, n), "pre_bias": (d,), "latent_bias": (n,)}
    t = held.take(shapes)
    stored = next((whole_number(path, values, name) for name in ("top_k", "k") if name in values), None)
    k = given.k if given.k is not None else stored
    config = config_of(path, d_model=d, n_latents=n, activation="relu" if k is None else "topk", k=k)
    return config, one_bias(t["encoder.weight"], t["latent_bias"], t["decoder.weight"].T, t["pre_bias"])


FORMAT = Format(NAME, TITLE, (), detect, read)
