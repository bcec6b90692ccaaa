"""bartbussmann's matryoshka SAEs, which SAEdit (arXiv 2510.05081) published: `config.json`, `pytorch_model.bin`.

| tensor | shape | |
|---|---|---|
| W_enc, W_dec | (d, n), (n, d) | |
| b_enc | (n) | stored and never used |
| b_dec | (d) | subtracted from the input, added to the output |
| threshold | () | relu((x - b_dec) W_enc) is active where it exceeds it |

| config.json | |
|---|---|
| act_size, dict_size, top_k | d, n, and k of the training, over the batch |
| group_sizes | latents of every level |
| input_unit_norm | every row is standardised first, and the reconstruction put back |
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, Weights, described, listed, read_json, weights
from sparsefeat.sae.formats.foreign_config import config_of, flag, k_of, text, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "matryoshka", "bartbussmann's matryoshka, SAEdit"
CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"
HARMLESS = listed(
    "top_k_aux sae_type site hook_point top_k_matryoshka n_batches_to_dead num_tokens enc_dtype seq_len bandwidth"
)


def detect(place: Path) -> bool:
    return (place / WEIGHTS).exists() and (place / CONFIG).exists() and "dict_size" in read_json(place / CONFIG)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with described(place / CONFIG, HARMLESS) as values, weights(place / WEIGHTS, frozenset({"b_enc"})) as held:
        return _read(given, values, held)


def _read(given: Given, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = values.path
    d, n = whole_number(path, values, "act_size"), whole_number(path, values, "dict_size")
    t = held.take({"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,), "threshold": ()})
    k = whole_number(path, values, "top_k")
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation="batch_topk",
        k=k if given.k is None else k_of(path, values, given.k),
        inference="threshold",
        normalizer="standardize" if flag(path, values, "input_unit_norm") else "b_pre",
        base_model=text(path, values, "model_name"),
        metadata={name: values[name] for name in ("group_sizes",) if name in values},
    )
    tensors = one_bias(t["W_enc"].T, t["W_enc"].new_zeros(n), t["W_dec"], t["b_dec"])
    return config, {**tensors, "threshold": t["threshold"]}


FORMAT = Format(NAME, TITLE, (CONFIG, WEIGHTS), detect, read)
