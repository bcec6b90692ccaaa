"""Diffusion transformers without a file of their own. What any of them has is known: it runs in the steps, under the
pipeline's guidance. Which of two output tensors is the image is not, nor is the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Transformer
from sparsefeat.pipeline.part import Part


class OtherTransformer(Transformer):
    kinds = (("block", r"((single_|joint_)?transformer_blocks|double_blocks|single_blocks|blocks|layers)\.\d+"),)

    def claims(self, root: nn.Module) -> bool:
        # Every diffusion transformer of diffusers is called so; a VAE may be called Transformer too, by its own prefix.
        name = type(root).__name__
        return "Transformer" in name and not name.startswith("Autoencoder") and hasattr(root, "config")

    def output_part(self, path: str, stream: str, output: Any, run: Run) -> Part:
        if isinstance(output, (tuple, list)) and sum(isinstance(element, torch.Tensor) for element in output) > 1:
            raise TypeError(
                f"{path} of {type(run.root).__name__} gave {len(output)} outputs, and sparsefeat does not know this "
                "model, so which one is the image stream cannot be told: hook a module inside the block that gives one "
                "tensor, such as its attention or feed-forward, or add a file for the model to sparsefeat/pipeline"
            )
        return Part()

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return None
