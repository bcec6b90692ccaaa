"""Fixtures of saprmarks/dictionary_learning: `ae.pt` and `config.json`, as its `trainSAE` writes them.

.venv-peers/bin/python -m tools.interop.dictionary_learning [FOLDER]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from dictionary_learning.dictionary import AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from torch import Tensor

from tools.interop import fixture

NAME, PACKAGE = "dictionary_learning", "dictionary-learning"
D_MODEL, N_LATENTS, K = 10, 24, 4

# n_latents == d_model in "square": there a wrong orientation has the right shape.
CASES = {
    "topk": (AutoEncoderTopK, (D_MODEL, N_LATENTS, K), None),
    "square": (AutoEncoderTopK, (D_MODEL, D_MODEL, K), None),
    "batch_topk": (BatchTopKSAE, (D_MODEL, N_LATENTS, K), 0.4),
    "matryoshka": (MatryoshkaBatchTopKSAE, (D_MODEL, N_LATENTS, K, [8, 16]), 0.4),
    "jumprelu": (JumpReluAutoEncoder, (D_MODEL, N_LATENTS), None),
    "gated": (GatedAutoEncoder, (D_MODEL, N_LATENTS), None),
    "standard": (AutoEncoder, (D_MODEL, N_LATENTS), None),
    "standard_new": (AutoEncoderNew, (D_MODEL, N_LATENTS), None),
}


def make(folder: Path) -> None:
    for seed, (case, (kind, arguments, threshold)) in enumerate(CASES.items()):
        model = kind(*arguments)
        fixture.fill(model, seed)
        if threshold is not None:
            model.threshold.fill_(threshold)
        if kind is JumpReluAutoEncoder:  # as trained ones are, and one latent with a negative threshold
            with torch.no_grad():
                model.threshold.abs_()
                model.threshold[0] = -0.2
        place = fixture.new_case(folder / case)
        torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, place / "ae.pt")
        (place / "config.json").write_text(json.dumps({"trainer": trainer_config(model)}, indent=4))
        x = fixture.rows(D_MODEL, 100 + seed)
        fixture.write_expected(place, x, *computed(model, x), NAME, PACKAGE)
    backup(folder)


def trainer_config(model: Any) -> dict[str, Any]:
    """What its trainers' `config` say of an SAE; the rest of theirs is about the training."""
    config = {
        "dict_class": type(model).__name__,
        "activation_dim": model.activation_dim,
        "dict_size": model.dict_size,
        "layer": 8,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "wandb_name": type(model).__name__,
        "submodule_name": "resid_post_layer_8",
    }
    if hasattr(model, "k"):
        config["k"] = int(model.k)
    return config


def backup(folder: Path) -> None:
    """The `ae.pt` of a run that goes on: the weights inside, still scaled for activations divided by norm_factor."""
    model = BatchTopKSAE(D_MODEL, N_LATENTS, K)
    fixture.fill(model, 50)
    model.threshold.fill_(0.3)
    place = fixture.new_case(folder / "backup")
    config = trainer_config(model)
    norm_factor = 2.5
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inside = {"step": 1200, "ae": state, "optimizer": {"state": {}, "param_groups": []}, "config": config}
    torch.save({**inside, "norm_factor": norm_factor}, place / "ae.pt")
    (place / "config.json").write_text(json.dumps({"trainer": config}, indent=4))
    model.scale_biases(norm_factor)  # what its trainSAE does before it saves the final SAE
    x = fixture.rows(D_MODEL, 150)
    # Releases after this package's write such files: outputs are the package's, the form is the description's.
    fixture.write_expected(place, x, *computed(model, x), NAME, PACKAGE, form="described")


@torch.no_grad()
def computed(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    code = model.encode(x)
    return code, model.decode(code)


def open_with_peer(place: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and reconstruction by the library's own loader, of a folder that sparsefeat wrote."""
    kind = json.loads((place / "config.json").read_text())["trainer"]["dict_class"]
    kinds = {found.__name__: found for found, _, _ in CASES.values()}
    return computed(
        kinds[kind].from_pretrained(
            str(place / "ae.pt"), **({"normalize_decoder": False} if kind == "AutoEncoder" else {})
        ),
        x,
    )


if __name__ == "__main__":
    fixture.main(NAME, make)
