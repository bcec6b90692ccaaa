"""Lumina-Next: blocks of the image with self-attention (`attn1`) and cross-attention to the text (`attn2`)."""

from __future__ import annotations

from sparsefeat.pipeline.families.transformer import Transformer

_LAYER = r"layers\.\d+"


class Lumina(Transformer):
    classes = ("LuminaNextDiT2DModel",)
    kinds = (
        ("transformer_block", _LAYER),
        ("self_attention", _LAYER + r"\.attn1"),
        ("cross_attention", _LAYER + r"\.attn2"),
        ("feed_forward", _LAYER + r"\.feed_forward"),
    )
