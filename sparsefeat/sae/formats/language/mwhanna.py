"""mwhanna's transcoders of Qwen3: `layer_N.safetensors`, and beside it `config.yaml`, which names the model.

`W_enc` (n, d), `W_dec` (n, d), `b_enc`, `b_dec`: from what goes into layer N's MLP to what comes out of it, ReLU, nothing
subtracted. `wandb-config.yaml` (also spelt `wanb-config.yaml`) says the sizes too.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import names_in, read_yaml, weights
from sparsefeat.sae.formats.foreign_config import config_of, text
from sparsefeat.sae.formats.format import Format, Given, one_bias
from sparsefeat.sae.formats.language.places import said_by

NAME, TITLE = "mwhanna", "mwhanna's transcoders"
FILE = re.compile(r"layer_(\d+)\.safetensors")
CONFIG = "config.yaml"


def detect(place: Path) -> bool:
    return place.is_file() and FILE.fullmatch(place.name) is not None and {"W_enc", "W_dec"} <= names_in(place)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    layer = FILE.fullmatch(place.name)
    with weights(place) as held:
        n, d = held.matrix("W_enc")
        t = held.take({"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)})
    config = config_of(
        place,
        d_model=d,
        n_latents=n,
        activation="relu",
        normalizer="none",
        transcoder=True,
        hookpoint=f"model.layers.{layer[1]}.mlp:input" if layer else None,
        base_model=_base_model(place),
    )
    return config, one_bias(t["W_enc"], t["b_enc"], t["W_dec"], t["b_dec"], subtracted=False)


def _base_model(place: Path) -> str | None:
    beside = place.parent / CONFIG
    if beside.exists():
        return text(beside, read_yaml(beside), "model_name")
    size = re.search(r"qwen3-(\d+(?:\.\d+)?)b", said_by(place))
    return f"Qwen/Qwen3-{size[1]}B" if size else None


FORMAT = Format(NAME, TITLE, (), detect, read, optional=(CONFIG,))
