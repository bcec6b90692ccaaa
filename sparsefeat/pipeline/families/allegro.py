"""Allegro: blocks of the video with self-attention (`attn1`) and cross-attention to the text (`attn2`)."""

from __future__ import annotations

from sparsefeat.pipeline.families.cosmos import VideoTransformer


class Allegro(VideoTransformer):
    classes = ("AllegroTransformer3DModel",)
