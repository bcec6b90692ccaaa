"""Lumina-Next: blocks of the image with self-attention (`attn1`) and cross-attention to the text (`attn2`),
whose outputs [B, positions, heads, C / heads] are no sequence of rows: hook the layer or its `feed_forward`.
"""

from __future__ import annotations

from sparsefeat.pipeline.families.transformer import Transformer

_LAYER = r"layers\.\d+"


class Lumina(Transformer):
    classes = ("LuminaNextDiT2DModel",)
    kinds = (
        ("transformer_block", _LAYER),
        ("feed_forward", _LAYER + r"\.feed_forward"),
    )
