"""Fixtures of openai/sparse_autoencoder's `.pt` files, from the format's description: it was never a package.

    .venv/bin/python -m tools.interop.openai [FOLDER]

A state dict with two entries that are no tensors: `activation`, the name of a class, and `activation_state_dict`. TopK
files standardise every row (unbiased deviation + 1e-5, put back without the 1e-5); ReLU files do not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.interop import fixture

NAME, PACKAGE = "openai", None
CASES: dict[str, dict[str, Any]] = {
    "relu": {"d_model": 12, "n_latents": 20, "activation": "ReLU"},
    "relu_unnamed": {"d_model": 10, "n_latents": 10, "activation": None},  # before the class was stored
    "topk": {"d_model": 12, "n_latents": 24, "activation": "TopK", "k": 4, "postact_fn": "ReLU"},
    "topk_square": {"d_model": 14, "n_latents": 14, "activation": "TopK", "k": 9, "postact_fn": "ReLU"},
    "topk_identity": {"d_model": 12, "n_latents": 12, "activation": "TopK", "k": 9, "postact_fn": "Identity"},
}


def make(folder: Path) -> None:
    for seed, (case, settings) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        d, n, name = settings["d_model"], settings["n_latents"], settings["activation"]
        tensors = {
            "pre_bias": 0.5 * torch.randn(d, generator=random),
            "latent_bias": 0.5 * torch.randn(n, generator=random),
            "encoder.weight": 0.5 * torch.randn(n, d, generator=random),
            "decoder.weight": 0.5 * torch.randn(d, n, generator=random),
        }
        state: dict[str, Any] = {
            **tensors,
            "stats_last_nonzero": torch.randint(0, 1000, (n,), generator=random),
            "latents_activation_frequency": torch.rand(n, generator=random),
            "latents_mean_square": torch.rand(n, generator=random),
        }
        if name is not None:
            state["activation"] = name
            inside = {"k": settings["k"], "postact_fn": settings["postact_fn"]} if name == "TopK" else {}
            state["activation_state_dict"] = inside
        place = fixture.new_case(folder / case)
        torch.save(state, place / "autoencoder.pt")
        x = fixture.rows(d, 100 + seed)
        fixture.write_expected(place, x, *computed(tensors, settings, x), NAME, PACKAGE)


def computed(t: dict[str, Tensor], settings: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    mean, spread, inside = 0.0, 1.0, x
    if settings["activation"] == "TopK":
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        inside = (x - mean) / (spread + 1e-5)
    code = (inside - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"]
    if settings["activation"] == "TopK":
        top = code.topk(settings["k"])
        code = torch.zeros_like(code).scatter(1, top.indices, top.values)
    if settings.get("postact_fn", "ReLU") == "ReLU":
        code = code.relu()
    return code, (code @ t["decoder.weight"].T + t["pre_bias"]) * spread + mean


if __name__ == "__main__":
    fixture.main(NAME, make)
