"""Qwen-Image: joint blocks that give (text, image); in their attention the text comes first.

The latent comes packed; `img_shapes` has the grid of each image's tokens, the one that is being made first, those of
reference images (Qwen-Image-Edit) after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer

_BLOCK = r"transformer_blocks\.\d+"


class QwenImage(JointTransformer):
    classes = ("QwenImageTransformer2DModel", "QwenImageControlNetModel")
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn"),
        ("feed_forward", _BLOCK + r"\.img_mlp"),
        ("text_feed_forward", _BLOCK + r"\.txt_mlp"),
    )
    joint_blocks = _BLOCK

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        """The prompt without the template before it and without padding; shorter prompts of a batch padded again."""
        dropped = getattr(pipe, "prompt_template_encode_start_idx", None)
        return None if not isinstance(dropped, int) else TextLayout(dropped=dropped, packed=True, more=True)

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        shapes = arguments.get("img_shapes")
        if not isinstance(shapes, (list, tuple)) or not shapes:
            return None
        # One entry for each batch entry: (frames, h, w), or a list of such, one for each image.
        entry = shapes[0] if isinstance(shapes[0], (list, tuple)) and not isinstance(shapes[0][0], int) else shapes[:1]
        frames, height, width = entry[0]
        if getattr(getattr(root, "config", None), "use_layer3d_rope", False):
            # Qwen-Image-Layered makes several images of one size; its positions count the last as the one given.
            made = entry[:-1]
            return (len(made), height, width) if made and set(map(tuple, made)) == {(1, height, width)} else None
        return (height, width) if frames == 1 else (frames, height, width)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size = getattr(pipe, "default_sample_size", None)  # of the latent, before 2 x 2 of it are packed into a token
        return (size // 2, size // 2) if isinstance(size, int) else None
