"""The VAEs: models that encode and decode. They run outside the steps and know no condition; their feature maps
[B, C, h, w] or [B, C, frames, h, w] carry their grid.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Family, Rows, Run, UnknownRowsError


class Autoencoder(Family):
    never_reached = (
        "the VAE decodes after the last step, and not at all with output_type='latent', nor does it encode in a pipeline from "
        "text alone"
    )

    def claims(self, root: nn.Module) -> bool:
        return callable(getattr(root, "encode", None)) and callable(getattr(root, "decode", None))

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        parts = [name for name in ("tiling", "slicing") if getattr(run.root, f"use_{name}", False)]
        if parts:
            raise UnknownRowsError(
                path,
                run.root,
                f"{parts[0]} is on, so that it runs on parts of the images: pipe.vae.disable_{parts[0]}()",
            )
        if tensor.ndim not in (4, 5):
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)}, which is no feature map")
        return 0, None
