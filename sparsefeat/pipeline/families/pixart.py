"""PixArt-alpha and PixArt-Sigma: blocks with self-attention (`attn1`) and cross-attention to the text (`attn2`); and DiT,
which they grew from, without the second.
"""

from __future__ import annotations

from sparsefeat.pipeline.families.transformer import Transformer

_BLOCK = r"transformer_blocks\.\d+"


class PixArt(Transformer):
    classes = ("PixArtTransformer2DModel", "PixArtControlNetAdapterModel", "DiTTransformer2DModel")
    kinds = (
        ("transformer_block", _BLOCK),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
