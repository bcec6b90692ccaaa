"""Fixtures of DifFRACT's files from their description, computed in float64 with diffusers' embedding of the timestep.

.venv/bin/python -m tools.interop.difffract [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch.nn import functional

from tools.interop import fixture

NAME = "difffract"
D, N, E = 12, 24, 16
CASES = {"transcoder_img_6": 0.75, "transcoder_txt_0": 1.0, "sae_img_12": 0.25, "sae_txt_18": 0.5}


def make(folder: Path) -> None:
    for seed, (case, timestep) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        sizes = {
            "time_mlp.0": (E, E),
            "time_mlp.2": (E, E),
            "mod_linear": (2 * D, E),
            "encoder": (N, D),
            "decoder": (D, N),
        }
        state = {}
        for name, (out, into) in sizes.items():
            state[f"{name}.weight"] = 0.5 * torch.randn(out, into, generator=random)
            state[f"{name}.bias"] = 0.5 * torch.randn(out, generator=random)
        state["decoder.weight"] /= state["decoder.weight"].norm(dim=0)
        place = fixture.new_case(folder / case)
        torch.save(state, place / f"{case}.pt")
        x = fixture.rows(D, 100 + seed)
        s = {name: tensor.double() for name, tensor in state.items()}
        inner = get_timestep_embedding(torch.tensor([timestep]), E).double()
        for layer in ("time_mlp.0", "time_mlp.2"):
            inner = functional.silu(inner @ s[f"{layer}.weight"].T + s[f"{layer}.bias"])
        scale, shift = (inner @ s["mod_linear.weight"].T + s["mod_linear.bias"]).split(D, dim=1)
        code = ((x.double() * (1 + scale) + shift) @ s["encoder.weight"].T + s["encoder.bias"]).relu()
        reconstruction = code @ s["decoder.weight"].T + s["decoder.bias"]
        fixture.write_expected(place, x, code, reconstruction, NAME, None, file=f"{case}.pt", timestep=timestep)


if __name__ == "__main__":
    fixture.main(NAME, make)
