"""Fixtures of overcomplete: state dicts, `torch.save(sae.state_dict(), "sae.pt")`; it has no format of its own.

.venv-peers/bin/python -m tools.interop.overcomplete [FOLDER]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers.overcomplete import what_its_import_needs
from tools.interop import fixture

with what_its_import_needs():
    from overcomplete.sae import SAE, JumpSAE, TopKSAE
    from overcomplete.sae.rasae import RATopKSAE

NAME, PACKAGE = "overcomplete", "overcomplete"
D_MODEL, N_LATENTS, K = 10, 24, 4


def points() -> Tensor:
    return fixture.rows(D_MODEL, 7, 30)


CASES: dict[str, tuple[Callable[[], Any], int | None]] = {
    "topk": (lambda: TopKSAE(D_MODEL, N_LATENTS, top_k=K), K),
    "square": (lambda: TopKSAE(D_MODEL, D_MODEL, top_k=K), K),
    "multiplier": (lambda: TopKSAE(D_MODEL, N_LATENTS, top_k=K, dictionary_params={"use_multiplier": True}), K),
    "batch_norm": (lambda: TopKSAE(D_MODEL, N_LATENTS, top_k=K, encoder_module="mlp_bn_1"), K),
    "tied": (lambda: TopKSAE(D_MODEL, N_LATENTS, top_k=K).tied(bias=True), K),
    "untied": (lambda: TopKSAE(D_MODEL, N_LATENTS, top_k=K).untied(), K),
    "archetypal": (lambda: RATopKSAE(D_MODEL, N_LATENTS, points(), top_k=K, delta=0.5), K),
    "jumprelu": (lambda: JumpSAE(D_MODEL, N_LATENTS), None),
    "plain": (lambda: SAE(D_MODEL, N_LATENTS), N_LATENTS),
}


def make(folder: Path) -> None:
    for seed, (case, (opened, k)) in enumerate(CASES.items()):
        sae = opened()
        fixture.fill(sae, seed)
        for module in sae.modules():
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.copy_(fixture.rows(N_LATENTS, seed)[0])
                module.running_var.copy_(fixture.rows(N_LATENTS, seed)[1].abs() + 0.3)
        sae.eval()  # normalises the dictionary, as every call in training does
        place = fixture.new_case(folder / case)
        torch.save(sae.state_dict(), place / "sae.pt")
        x = fixture.rows(D_MODEL, 100 + seed)
        with torch.no_grad():
            _, code, reconstruction = sae(x)
        fixture.write_expected(place, x, code, reconstruction, NAME, PACKAGE, file="sae.pt", k=k)


if __name__ == "__main__":
    fixture.main(NAME, make)
