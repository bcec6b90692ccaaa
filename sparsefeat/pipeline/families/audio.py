"""Transformers of audio: Stable Audio, whose sequence begins with one token of the prompt and the times, and ACE-Step, which
cuts its latent into patches and pads the last. Their rows are of the "audio" stream and have no grid.
"""

from __future__ import annotations

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Side, Transformer, configured


class StableAudio(Transformer):
    stream = "audio"
    classes = ("StableAudioDiTModel",)
    kinds = (
        ("transformer_block", r"transformer_blocks\.\d+"),
        ("self_attention", r"transformer_blocks\.\d+\.attn1"),
        ("cross_attention", r"transformer_blocks\.\d+\.attn2"),
        ("feed_forward", r"transformer_blocks\.\d+\.ff"),
    )
    image_modules = r"proj_out"

    def side(self, run: Run) -> Side | None:
        latent = run.arguments.get("hidden_states")  # [B, channels, length]
        return Side(1, latent.shape[2]) if isinstance(latent, torch.Tensor) and latent.ndim == 3 else None


class AceStep(Transformer):
    stream = "audio"
    classes = ("AceStepTransformer1DModel",)
    kinds = (
        ("transformer_block", r"layers\.\d+"),
        ("self_attention", r"layers\.\d+\.self_attn"),
        ("cross_attention", r"layers\.\d+\.cross_attn"),
        ("feed_forward", r"layers\.\d+\.mlp"),
    )
    image_modules = r"norm_out"
    text_modules = r"layers\.\d+\.cross_attn\.(to_[kv]|norm_k)(\..*)?|condition_embedder"

    def side(self, run: Run) -> Side | None:
        latent, patch = run.arguments.get("hidden_states"), configured(run.root, "patch_size")  # [B, length, channels]
        if not isinstance(latent, torch.Tensor) or latent.ndim != 3 or patch is None:
            return None
        return Side(0, -(-latent.shape[1] // patch))

    def width(self, module: nn.Module, io: str) -> int | None:
        projection = getattr(getattr(module, "self_attn", module), "to_q", None)
        return getattr(projection, "in_features", None)
