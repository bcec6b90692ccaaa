"""Fixtures of Llama Scope's layout, opened by sae-lens's loader.

.venv-peers/bin/python -m tools.interop.llama_scope [FOLDER]
"""

from __future__ import annotations

import math
from pathlib import Path

from sae_lens.loading import pretrained_sae_loaders as loaders
from safetensors.torch import save_file

from tools.interop import fixture, published
from tools.interop.published import SHAPE

NAME = "llama_scope"
CASES = {"residual": ("R", "hook_resid_post", 2.7), "mlp": ("M", "hook_mlp_out", 0.9)}


def make(folder: Path) -> None:
    d, n = SHAPE["d_in"], SHAPE["d_sae"]
    for seed, (case, (letter, place, average)) in enumerate(CASES.items()):
        repository, inside = f"fnlp/Llama3_1-8B-Base-LX{letter}-8x", f"Llama3_1-8B-Base-L15{letter}-8x"
        root = fixture.new_case(folder / case)
        (root / repository / inside / "checkpoints").mkdir(parents=True)
        shapes = {"encoder.weight": (n, d), "encoder.bias": (n,), "decoder.weight": (d, n), "decoder.bias": (d,)}
        save_file(published.made(seed, shapes), root / repository / inside / "checkpoints" / "final.safetensors")
        described = {
            "d_model": d,
            "d_sae": n,
            "hook_point_in": f"blocks.15.{place}",
            "hook_point_out": f"blocks.15.{place}",
            "act_fn": "jumprelu",
            "jump_relu_threshold": 0.4,
            "norm_activation": "dataset-wise",
            "dataset_average_activation_norm": {"in": average, "out": average},
            "apply_decoder_bias_to_pre_encoder": False,
            "use_decoder_bias": True,
            "expansion_factor": 8,
        }
        published.put(root / repository / inside / "hyperparams.json", described)
        scale = math.sqrt(d) / average
        sae = published.opened(root, loaders.llama_scope_sae_huggingface_loader, repository, inside, scale)
        published.write(root, sae, f"{repository}/{inside}", NAME, seed)


if __name__ == "__main__":
    fixture.main(NAME, make)
