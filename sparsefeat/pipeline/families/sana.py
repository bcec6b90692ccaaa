"""Sana and Sana-Sprint: linear self-attention (`attn1`, without a softmax), cross-attention to the
text (`attn2`), and a convolutional feed-forward on the feature map [B, C, h, w] (`ff`).
"""

from __future__ import annotations

from torch import nn

from sparsefeat.pipeline.families.transformer import Transformer, width_of

_BLOCK = r"transformer_blocks\.\d+"


class Sana(Transformer):
    classes = ("SanaTransformer2DModel", "SanaControlNetModel")
    kinds = (
        ("transformer_block", _BLOCK),
        ("linear_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )

    feature_maps = rf"{_BLOCK}\.ff(\..*)?|patch_embed\.proj"

    def width(self, module: nn.Module, io: str) -> int | None:
        if hasattr(module, "conv_point"):  # GLUMBConv
            return module.conv_point.out_channels if io == "output" else module.conv_inverted.in_channels
        return width_of(module, io)
