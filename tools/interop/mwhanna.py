"""Fixtures of the layout of mwhanna's transcoders, opened by sae-lens's loader.

.venv-peers/bin/python -m tools.interop.mwhanna [FOLDER]
"""

from __future__ import annotations

from pathlib import Path

import yaml
from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file

from tools.interop import fixture, published
from tools.interop.published import SHAPE

NAME = "mwhanna"
CASES = {
    "qwen3_4b": ("mwhanna/qwen3-4b-transcoders", "wandb-config.yaml"),
    "qwen3_14b": ("mwhanna/qwen3-14b-transcoders", "wanb-config.yaml"),
}


def make(folder: Path) -> None:
    d, n = SHAPE["d_in"], SHAPE["d_sae"]
    for seed, (case, (repository, sizes)) in enumerate(CASES.items()):
        root = fixture.new_case(folder / case)
        place = root / repository
        place.mkdir(parents=True)
        shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
        save_file(published.made(seed, shapes), place / "layer_9.safetensors")
        said = {"d_model": {"value": d}, "d_feature": {"value": n}, "batch_size": {"value": 64}}
        (place / sizes).write_text(yaml.safe_dump(said))
        if case == "qwen3_4b":
            (place / "config.yaml").write_text(yaml.safe_dump({"model_name": "Qwen/Qwen3-4B"}))
        sae = published.opened(root, loaders.mwhanna_transcoder_huggingface_loader, repository, "layer_9.safetensors")
        published.write(root, sae, f"{repository}/layer_9.safetensors", NAME, seed)


if __name__ == "__main__":
    fixture.main(NAME, make)
