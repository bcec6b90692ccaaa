"""LongCat-Image: built like FLUX.1; its position ids call the image that is made 1, and references 2 (LongCat-Image-Edit)."""

from __future__ import annotations

from sparsefeat.pipeline.families.flux import Flux


class LongCatImage(Flux):
    classes = ("LongCatImageTransformer2DModel",)
    made_id = 1
