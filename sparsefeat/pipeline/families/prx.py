"""PRX: blocks of the image, whose attention has the text among its keys."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsefeat.pipeline.families.transformer import Transformer, configured

_BLOCK = r"blocks\.\d+"


class PRX(Transformer):
    classes = ("PRXTransformer2DModel",)
    kinds = (
        ("transformer_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attention"),
    )
    text_modules = rf"txt_in|{_BLOCK}\.attention\.txt_kv_proj"
    image_modules = r"img_in(\..*)?|final_layer(\.linear)?"

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return False  # which of its keys are the text's is not told

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        pixels, scale = getattr(pipe, "default_sample_size", None), getattr(pipe, "vae_scale_factor", None)
        patch = configured(root, "patch_size")
        if not (isinstance(pixels, int) and isinstance(scale, int) and patch):
            return None
        return pixels // scale // patch, pixels // scale // patch

    def width(self, module: nn.Module, io: str) -> int | None:
        projection = getattr(module, "img_qkv_proj", None)
        return (
            getattr(module, "hidden_size", None)
            or getattr(projection, "in_features", None)
            or super().width(module, io)
        )
