"""HunyuanDiT: blocks of the image with self-attention (`attn1`) and cross-attention to both texts (`attn2`). The second
half of the blocks also takes the output of one of the first half: an edit there comes back through it.
"""

from __future__ import annotations

from sparsefeat.pipeline.families.transformer import Transformer

_BLOCK = r"blocks\.\d+"


class HunyuanDiT(Transformer):
    classes = ("HunyuanDiT2DModel", "HunyuanDiT2DControlNetModel")
    kinds = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
