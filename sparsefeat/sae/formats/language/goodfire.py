"""Goodfire's SAEs: one `.pt` or `.pth` file called `MODEL-SAE-lN.pth`, ReLU, nothing subtracted from the input.

`encoder_linear.weight` (n, d), `encoder_linear.bias`, `decoder_linear.weight` (d, n), `decoder_linear.bias`.
"""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import names_in, weights
from sparsefeat.sae.formats.foreign_config import config_of
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "goodfire", "Goodfire"


def detect(place: Path) -> bool:
    return place.is_file() and {"encoder_linear.weight", "decoder_linear.weight"} <= names_in(place)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with weights(place) as held:
        n, d = held.matrix("encoder_linear.weight")
        t = held.take(
            {
                "encoder_linear.weight": (n, d),
                "encoder_linear.bias": (n,),
                "decoder_linear.weight": (d, n),
                "decoder_linear.bias": (d,),
            }
        )
    said = re.fullmatch(r"(Llama-[\w.]+-\d+B(?:-Instruct)?)-SAE-l(\d+)", place.stem)
    config = config_of(
        place,
        d_model=d,
        n_latents=n,
        activation="relu",
        normalizer="none",
        hookpoint=f"model.layers.{said[2]}" if said else None,
        base_model=f"meta-llama/{said[1]}" if said else None,
    )
    return config, one_bias(
        t["encoder_linear.weight"],
        t["encoder_linear.bias"],
        t["decoder_linear.weight"].T,
        t["decoder_linear.bias"],
        subtracted=False,
    )


FORMAT = Format(NAME, TITLE, (), detect, read)
