"""A fixture of Qwen Scope's layout, opened by sae-lens's loader.

.venv-peers/bin/python -m tools.interop.qwen_scope [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens.loading import pretrained_sae_loaders as loaders

from tools.interop import fixture, published

NAME = "qwen_scope"
# The width stands in the name in units of 1024.
REPOSITORY, FILE, LATENTS = "Qwen/SAE-Res-Qwen3-1.7B-Base-W1K-L0_5", "layer6.sae.pt", 1024


def make(folder: Path) -> None:
    d = published.SHAPE["d_in"]
    root = fixture.new_case(folder / "layer_6")
    (root / REPOSITORY).mkdir(parents=True)
    shapes = {"W_enc": (LATENTS, d), "W_dec": (d, LATENTS), "b_enc": (LATENTS,), "b_dec": (d,)}
    torch.save(published.made(0, shapes), root / REPOSITORY / FILE)
    sae = published.opened(root, loaders.qwen_scope_sae_huggingface_loader, REPOSITORY, FILE, d_in=d)
    published.write(root, sae, f"{REPOSITORY}/{FILE}", NAME, 0)


if __name__ == "__main__":
    fixture.main(NAME, make)
