"""What the package brings along: EmojiCanvas, the embedded pipeline, its SAEs, and how to open them."""

from __future__ import annotations

from sparsefeat.assets.embedded import (
    GUIDANCE,
    JOINT,
    N_STEPS,
    block_sae_folder,
    cross_attention_sae_folders,
    embedded_fingerprint,
    load_pipeline,
    sae_folders,
    text_encoder_sae_folder,
    weights_fingerprint,
)

__all__ = [
    "GUIDANCE",
    "JOINT",
    "N_STEPS",
    "block_sae_folder",
    "cross_attention_sae_folders",
    "embedded_fingerprint",
    "load_pipeline",
    "sae_folders",
    "text_encoder_sae_folder",
    "weights_fingerprint",
]
