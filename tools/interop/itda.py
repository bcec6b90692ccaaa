"""Fixtures of ITDA: no package of it can be installed, so files and outputs follow its description.

.venv-peers/bin/python -m tools.interop.itda [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor

from tools.interop import fixture

NAME = "itda"
CASES = {"itda": (10, 24, 4), "square": (12, 12, 3), "as_many_steps_as_atoms": (6, 8, 8)}


def make(folder: Path) -> None:
    for seed, (case, (d_model, n_atoms, k)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.randn(n_atoms, d_model, generator=generator)
        atoms = atoms / atoms.norm(dim=1, keepdim=True)
        place = fixture.new_case(folder / case)
        torch.save(atoms, place / "atoms.pt")
        torch.save(torch.randint(0, 500, (n_atoms, 2), generator=generator), place / "atom_indices.pt")
        described = {"k": k, "layer": 8, "lm_name": "gpt2", "activation_dim": d_model, "loss_threshold": 0.01}
        (place / "metadata.yaml").write_text(yaml.dump({**described, "device": "cuda", "submodule_name": None}))
        x = 3 * fixture.rows(d_model, 100 + seed)
        fixture.write_expected(place, x, *computed(atoms, x, k), NAME, None)


def computed(atoms: Tensor, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Row by row, step by step, in float64; the same atom may be taken again."""
    atoms = atoms.double()
    code = torch.zeros(len(x), len(atoms), dtype=torch.float64)
    for row, residual in enumerate(x.double()):
        for _ in range(k):
            correlations = atoms @ residual
            best = int(correlations.abs().argmax())
            code[row, best] += correlations[best]
            residual = residual - correlations[best] * atoms[best]
    return code, code @ atoms


if __name__ == "__main__":
    fixture.main(NAME, make)
