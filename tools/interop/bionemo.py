"""Fixtures of BioNeMo's SAE files from their description: the package is not published.

.venv/bin/python -m tools.interop.bionemo [FOLDER]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tools.interop import fixture

NAME = "bionemo"
D, N, K = 12, 24, 4
CASES: dict[str, dict[str, Any]] = {"topk": {"top_k": K}, "relu": {"l1_coefficient": 1e-3}}


def make(folder: Path) -> None:
    for seed, (case, config) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        shapes = {"encoder.weight": (N, D), "decoder.weight": (D, N), "pre_bias": (D,), "latent_bias": (N,)}
        state = {name: 0.5 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
        place = fixture.new_case(folder / case)
        counter = {"stats_last_nonzero": torch.zeros(N, dtype=torch.int64)}
        held = {"model_state_dict": {**state, **counter}, "model_config": config, "input_dim": D, "hidden_dim": N}
        torch.save(held, place / "checkpoint.pt")
        x = fixture.rows(D, 100 + seed)
        pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
        top = pre.topk(K if "top_k" in config else N)
        code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        reconstruction = code @ state["decoder.weight"].T + state["pre_bias"]
        fixture.write_expected(place, x, code, reconstruction, NAME, None, file="checkpoint.pt")


if __name__ == "__main__":
    fixture.main(NAME, make)
