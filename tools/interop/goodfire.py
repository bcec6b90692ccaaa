"""A fixture of Goodfire's layout, opened by sae-lens's loader.

.venv-peers/bin/python -m tools.interop.goodfire [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens.loading import pretrained_sae_loaders as loaders

from tools.interop import fixture, published
from tools.interop.published import SHAPE

NAME = "goodfire"
REPOSITORY, FILE = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19", "Llama-3.1-8B-Instruct-SAE-l19.pth"


def make(folder: Path) -> None:
    d, n = SHAPE["d_in"], SHAPE["d_sae"]
    root = fixture.new_case(folder / "layer_19")
    (root / REPOSITORY).mkdir(parents=True)
    sides = {"encoder_linear": (n, d), "decoder_linear": (d, n)}
    shapes = {
        f"{side}.{part}": shape[: 2 if part == "weight" else 1]
        for side, shape in sides.items()
        for part in ("weight", "bias")
    }
    torch.save(published.made(0, shapes), root / REPOSITORY / FILE)
    sae = published.opened(root, loaders.get_goodfire_huggingface_loader, REPOSITORY, FILE, **SHAPE)
    published.write(root, sae, f"{REPOSITORY}/{FILE}", NAME, 0)


if __name__ == "__main__":
    fixture.main(NAME, make)
