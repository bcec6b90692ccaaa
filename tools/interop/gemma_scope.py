"""Fixtures of Gemma Scope's layouts, opened by sae-lens's loaders of Gemma 2 and Gemma 3 SAEs.

.venv-peers/bin/python -m tools.interop.gemma_scope [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file
from torch import Tensor

from tools.interop import fixture, published
from tools.interop.published import SHAPE

NAME = "gemma_scope"
FIRST = {
    "residual": ("google/gemma-scope-2b-pt-res", "layer_3/width_16k/average_l0_5"),
    "mlp": ("google/gemma-scope-2b-pt-mlp", "layer_4/width_16k/average_l0_5"),
    "attention": ("google/gemma-scope-2b-pt-att", "layer_5/width_16k/average_l0_5"),
    "embedding": ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_5"),
    "instruct": ("google/gemma-scope-9b-it-res", "layer_9/width_16k/average_l0_5"),
}
SECOND = {
    "second_residual": ("google/gemma-scope-2-1b-it", "resid_post/layer_7_width_16k_l0_small", {}),
    "second_transcoder": (
        "google/gemma-scope-2-1b-it",
        "transcoder/layer_7_width_16k_l0_small_affine",
        {"affine_connection": True, "hf_hook_point_out": "model.layers.7.post_feedforward_layernorm.output"},
    ),
}
PLACES = {
    "second_residual": "model.layers.7.output",
    "second_transcoder": "model.layers.7.pre_feedforward_layernorm.output",
}


def tensors(seed: int) -> dict[str, Tensor]:
    d, n = SHAPE["d_in"], SHAPE["d_sae"]
    found = published.made(seed, {"w_enc": (d, n), "w_dec": (n, d), "b_enc": (n,), "b_dec": (d,), "threshold": (n,)})
    return found | {"threshold": found["threshold"].abs()}


def make(folder: Path) -> None:
    for seed, (case, (repository, inside)) in enumerate(FIRST.items()):
        root = fixture.new_case(folder / case)
        place = root / repository / inside
        place.mkdir(parents=True)
        upper = case == "instruct"  # the two spellings that the package takes
        arrays = {name.replace("w_", "W_") if upper else name: t.numpy() for name, t in tensors(seed).items()}
        np.savez(place / "params.npz", **arrays)
        sae = published.opened(root, loaders.gemma_2_sae_huggingface_loader, repository, inside, **SHAPE)
        published.write(root, sae, f"{repository}/{inside}", NAME, seed)
    for seed, (case, (repository, inside, more)) in enumerate(SECOND.items(), start=20):
        root = fixture.new_case(folder / case)
        place = root / repository / inside
        place.mkdir(parents=True)
        state = tensors(seed)
        if more:
            d = SHAPE["d_in"]
            state["affine_skip_connection"] = torch.randn(d, d, generator=torch.Generator().manual_seed(seed))
        save_file(state, place / "params.safetensors")
        described = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-it", "hf_hook_point_in": PLACES[case]}
        published.put(place / "config.json", described | more)
        sae = published.opened(root, loaders.gemma_3_sae_huggingface_loader, repository, inside)
        published.write(root, sae, f"{repository}/{inside}", NAME, seed)


if __name__ == "__main__":
    fixture.main(NAME, make)
