"""DifFRACT (arXiv 2606.15796): transcoders and SAEs of FLUX.1-schnell's MLPs whose input is shifted by the timestep.

One file each, `transcoder_{img,txt}_L.pt` (from the MLP's input to its output) or `sae_{img,txt}_L.pt` (of its output):

    z = relu(W (x (1 + scale(t)) + shift(t)) + b),  x_hat = D^T z + b_dec

| tensor | shape | |
|---|---|---|
| time_mlp.0, time_mlp.2 | (e, e), (e) | SiLU after either; of the sinusoidal embedding of t, e wide |
| mod_linear | (2 d, e), (2 d) | scale, then shift |
| encoder, decoder | (n, d), (n); (d, n), (d) | decoder columns are unit vectors |

t is the `timestep` that the transformer is given, between 0 and 1. See the normaliser "timestep".
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import names_in, weights
from sparsefeat.sae.formats.foreign_config import config_of
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "difffract", "DifFRACT"
BASE_MODEL = "black-forest-labs/FLUX.1-schnell"
MLPS = {"img": "ff", "txt": "ff_context"}
TIME = {
    "time_mlp.0": ("time_in_weight", "time_in_bias"),
    "time_mlp.2": ("time_out_weight", "time_out_bias"),
    "mod_linear": ("modulation_weight", "modulation_bias"),
}


def detect(place: Path) -> bool:
    return place.is_file() and {"time_mlp.0.weight", "mod_linear.weight", "encoder.weight"} <= names_in(place)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    said = re.fullmatch(r"(transcoder|sae)_(img|txt)_(\d+)", place.stem)
    kind, stream, block = said.groups() if said else ("", "", "")
    transcoder = kind == "transcoder"
    with weights(place) as held:
        n, d = held.matrix("encoder.weight")
        width = held.matrix("time_mlp.0.weight")[0]
        config = config_of(
            place,
            d_model=d,
            n_latents=n,
            activation="relu",
            normalizer="timestep",
            time_width=width,
            transcoder=transcoder,
            hookpoint=f"transformer.transformer_blocks.{block}.{MLPS[stream]}{':input' if transcoder else ''}"
            if said
            else None,
            base_model=BASE_MODEL if said else None,
        )
        ours = config.tensor_shapes()
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
        for theirs, (weight, bias) in TIME.items():
            shapes |= {f"{theirs}.weight": ours[weight], f"{theirs}.bias": ours[bias]}
        t = held.take(shapes)
    tensors = one_bias(
        t["encoder.weight"], t["encoder.bias"], t["decoder.weight"].T, t["decoder.bias"], subtracted=False
    )
    for theirs, (weight, bias) in TIME.items():
        tensors |= {weight: t[f"{theirs}.weight"], bias: t[f"{theirs}.bias"]}
    return config, tensors


FORMAT = Format(NAME, TITLE, (), detect, read)
