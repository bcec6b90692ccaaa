"""Sana-Video: blocks of the video with linear self-attention (`attn1`) and cross-attention to the text (`attn2`). Their
convolutional feed-forward works on [B, frames, h, w, C], which is no sequence of rows: hook the block.
"""

from __future__ import annotations

from sparsefeat.pipeline.families.cosmos import VideoTransformer

_BLOCK = r"transformer_blocks\.\d+"


class SanaVideo(VideoTransformer):
    classes = ("SanaVideoTransformer3DModel",)
    kinds = (
        ("transformer_block", _BLOCK),
        ("linear_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
    )
