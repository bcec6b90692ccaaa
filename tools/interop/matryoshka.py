"""Fixtures of the layout of bartbussmann's matryoshka SAEs, which SAEdit has, from its description: it is no package.

.venv/bin/python -m tools.interop.matryoshka [FOLDER]
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tools.interop import fixture

NAME = "matryoshka"
D, N, K, THRESHOLD = 12, 24, 4, 0.7


def make(folder: Path) -> None:
    for seed, (case, standardised) in enumerate({"plain": False, "input_unit_norm": True}.items()):
        random = torch.Generator().manual_seed(seed)
        shapes = {"W_enc": (D, N), "W_dec": (N, D), "b_enc": (N,), "b_dec": (D,)}
        state = {name: 0.5 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
        state["threshold"] = torch.tensor(THRESHOLD)
        place = fixture.new_case(folder / case)
        config = {"act_size": D, "dict_size": N, "top_k": K, "group_sizes": [8, 16], "input_unit_norm": standardised}
        (place / "config.json").write_text(
            json.dumps(config | {"lr": 3e-4, "aux_penalty": 0.03, "n_batches_to_dead": 5})
        )
        torch.save(state, place / "pytorch_model.bin")
        x = fixture.rows(D, 100 + seed)
        mean, spread = (x.mean(1, keepdim=True), x.std(1, keepdim=True)) if standardised else (0.0, 1.0)
        inner = (x - mean) / (spread + 1e-5) if standardised else x
        active = ((inner - state["b_dec"]) @ state["W_enc"]).relu()
        code = active * (active > THRESHOLD)
        reconstruction = (code @ state["W_dec"] + state["b_dec"]) * spread + mean
        fixture.write_expected(place, x, code, reconstruction, NAME, None)


if __name__ == "__main__":
    fixture.main(NAME, make)
