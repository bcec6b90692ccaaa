"""FLUX.1 and models built like it: double blocks that give (text, image), then single blocks over both.

A single block gives (text, image) since diffusers 0.35 and one tensor [text; image] before; which one is told by its
type. The latent comes packed, so the grid is read from the position ids: (0, y, x) for each token of the image that is
being made, with another first number for those of a reference image (Kontext).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.joint import JointTransformer

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"


class Flux(JointTransformer):
    classes: tuple[str, ...] = ("FluxTransformer2DModel", "FluxControlNetModel", "ChromaTransformer2DModel")
    kinds = (
        ("joint_block", _DOUBLE),
        ("joint_attention", _DOUBLE + r"\.attn"),
        ("feed_forward", _DOUBLE + r"\.ff"),
        ("text_feed_forward", _DOUBLE + r"\.ff_context"),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
    )
    joint_attentions = rf"({_DOUBLE}|{_SINGLE})\.attn"
    grid_arguments = ("img_ids",)

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return grid_of_ids(arguments.get("img_ids"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size = getattr(pipe, "default_sample_size", None)  # of the latent, before 2 x 2 of it are packed into a token
        return (size // 2, size // 2) if isinstance(size, int) else None


def grid_of_ids(ids: Any) -> tuple[int, ...] | None:
    """(h, w) of the image that is being made, from the position ids [tokens, (which image, y, x, ...)] of its tokens.

    Waits for the device once. None where the tokens are not those of a full rectangle.
    """
    if not isinstance(ids, torch.Tensor) or ids.ndim < 2 or ids.shape[-1] < 3:
        return None
    ids = (ids[0] if ids.ndim == 3 else ids).cpu()
    made = ids[ids[:, 0] == ids[0, 0]]
    height, width = (int(column.max() - column.min()) + 1 for column in (made[:, 1], made[:, 2]))
    return (height, width) if height * width == len(made) else None
