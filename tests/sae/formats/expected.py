"""What another program wrote and computed: the fixtures, and the comparison with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from sparsefeat.sae import SAE, load_sae

FIXTURES = Path(__file__).parent / "fixtures"
TOLERANCE = 1e-5


def cases(name: str) -> list[Path]:
    found = sorted(path.parent for path in (FIXTURES / name).glob("*/expected.safetensors"))
    assert found, f"no fixtures of {name}"
    return found


def copied(case: Path, folder: Path) -> Path:
    """A copy that a test may damage, without what the peer computed."""
    place = folder / case.name
    shutil.copytree(case, place, ignore=shutil.ignore_patterns("expected.safetensors", "made_by.json"))
    return place


def made_by(case: Path) -> dict[str, Any]:
    return json.loads((case / "made_by.json").read_text())


def expected(case: Path) -> dict[str, Tensor]:
    return load_file(case / "expected.safetensors")


def opened(case: Path, place: Path | None = None) -> SAE:
    """The SAE of a case, or of a copy of it."""
    made = made_by(case)
    place = place or case
    sae = load_sae(place / made["file"] if made.get("file") else place, k=made.get("k"))
    return sae.at_timestep(made["timestep"]) if "timestep" in made else sae


@torch.no_grad()
def largest_difference(sae: SAE, case: Path) -> float:
    """From what the peer computed, over the dense code and the reconstruction."""
    theirs = expected(case)
    x = theirs["x"]
    code = sae.encode(x).dense()
    reconstruction = sae(x)
    assert code.shape == theirs["code"].shape
    assert theirs["code"].count_nonzero() > 0
    differences = (code - theirs["code"]).abs().max(), (reconstruction - theirs["reconstruction"]).abs().max()
    return float(torch.stack(differences).max())
