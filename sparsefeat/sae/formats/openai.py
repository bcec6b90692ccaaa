"""openai/sparse_autoencoder: a state dict in one `.pt` file, of any name.

| key | |
|---|---|
| pre_bias [d], latent_bias [n] | the first subtracted from the input and added to the output |
| encoder.weight [n, d], decoder.weight [d, n] | |
| activation | the name of a class: "ReLU" (also where there is no such key) or "TopK" |
| activation_state_dict | of TopK: `k` and `postact_fn`, "ReLU" or "Identity", which comes after the selection |
| stats_last_nonzero, latents_activation_frequency, latents_mean_square [n] | of the training |

SAEs with TopK standardise every row, as `sparsefeat.sae.normalizers` has it, those with ReLU do not: the class is all that
tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Weights, names_in, shown, weights
from sparsefeat.sae.formats.fold import cannot_express, encoder_bias
from sparsefeat.sae.formats.foreign_config import config_of, whole_number
from sparsefeat.sae.formats.format import Format, Given, one_bias

NAME, TITLE = "openai", "OpenAI sparse_autoencoder"
WRITTEN = "autoencoder.pt"
EPS = 1e-5  # a constant of the original
STATISTICS = {
    "latents_activation_frequency": "activation_frequency",
    "latents_mean_square": "mean_square",
}


def detect(place: Path) -> bool:
    path = _file(place)
    if not path.is_file() or path.suffix not in (".pt", ".pth") or path.name == "state_dict.pth":
        return False
    return {"pre_bias", "latent_bias", "encoder.weight"} <= names_in(path)


def _file(place: Path) -> Path:
    return place / WRITTEN if place.is_dir() else place


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    with weights(_file(place)) as held:
        return _read(given, held)


def _read(given: Given, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    n, d = held.matrix("encoder.weight")
    shapes = {"pre_bias": (d,), "latent_bias": (n,), "encoder.weight": (n, d), "decoder.weight": (d, n)}
    statistics = {name: ours for name, ours in STATISTICS.items() if name in held}
    t = held.take({**shapes, **dict.fromkeys(statistics, (n,))})
    tensors = {
        **one_bias(t["encoder.weight"], t["latent_bias"], t["decoder.weight"].T, t["pre_bias"]),
        **{f"statistic_{ours}": t[name] for name, ours in statistics.items()},
    }
    activation, k = _activation(held.path, held)
    config = config_of(
        held.path,
        d_model=d,
        n_latents=n,
        activation=activation,
        k=k if given.k is None else given.k,
        normalizer="b_pre" if activation == "relu" else "standardize",
        eps=EPS,
        statistics=tuple(statistics.values()),
    )
    return config, tensors


def _activation(path: Path, state: Mapping[str, Any]) -> tuple[str, int | None]:
    name, inside = state.get("activation", "ReLU"), state.get("activation_state_dict")
    if name == "ReLU":
        return "relu", None
    if name == "TopK" and isinstance(inside, Mapping):
        after = {"ReLU": "topk", "Identity": "raw_topk"}.get(str(inside.get("postact_fn", "ReLU")))
        if after is not None:
            return after, whole_number(path, inside, "k")
    raise ValueError(
        f"activation in {path} is {shown(name)} with state {shown(inside)}: ReLU, or TopK with its k and a postact_fn of ReLU or "
        "Identity, can be read"
    )


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """`autoencoder.pt`. What is subtracted from the input becomes `b_out`, and the encoder's bias makes up for it."""
    topk = {"topk": "ReLU", "raw_topk": "Identity"}.get(config.activation)
    if topk is None and config.activation != "relu":
        raise cannot_express(TITLE, config)
    if topk is not None and (config.normalizer != "standardize" or config.eps != EPS):
        raise ValueError(
            f"{TITLE} standardises the rows of every TopK SAE with eps {EPS}, this one has normalizer "
            f"{config.normalizer!r} with eps {config.eps}: save in the native format instead"
        )
    if topk is None and config.normalizer not in ("none", "b_pre"):
        raise ValueError(
            f"{TITLE} cannot express normalizer {config.normalizer!r} of a ReLU SAE: save in the native format instead"
        )
    if config.skip or config.transcoder:
        raise ValueError(f"{TITLE} cannot express transcoders and skips: save in the native format instead")
    t = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    n = config.n_latents
    state: dict[str, Any] = {
        "pre_bias": t["b_out"],
        "latent_bias": encoder_bias(t, t["b_out"]),
        "encoder.weight": t["W_enc"],
        "decoder.weight": t["W_dec"].T,
        "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
        "latents_activation_frequency": t.get("statistic_activation_frequency", torch.ones(n, dtype=torch.float32)),
        "latents_mean_square": t.get("statistic_mean_square", torch.zeros(n, dtype=torch.float32)),
    }
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    state["activation"] = "ReLU" if topk is None else "TopK"
    state["activation_state_dict"] = {} if topk is None else {"k": config.k, "postact_fn": topk}
    torch.save(state, folder / WRITTEN)


FORMAT = Format(NAME, TITLE, (), detect, read, write, optional=(WRITTEN,))
