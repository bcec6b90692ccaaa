"""The grid of a video: its latent [B, channels, frames, h, w] cut into patches (of one frame each in most models)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def video_grid(root: nn.Module, latent: Any, time_first: bool = False) -> tuple[int, ...] | None:
    """(frames, h, w) of the patches, by the model's config; `time_first` where the latent is [B, frames, channels, ...].

    A config has `patch_size` as one number for both sides, with `patch_size_t` beside it or 1, or as three numbers.
    """
    config = getattr(root, "config", None)
    patch, frames_a_patch = getattr(config, "patch_size", 1), getattr(config, "patch_size_t", None) or 1
    if not isinstance(latent, torch.Tensor) or latent.ndim != 5:
        return None
    sides = tuple(patch) if isinstance(patch, Sequence) else (frames_a_patch, patch, patch)
    frames, (height, width) = latent.shape[1 if time_first else 2], latent.shape[3:]
    return -(-frames // sides[0]), height // sides[1], width // sides[2]
