"""The grid of a video: its latent [B, channels, frames, h, w] cut into patches (of one frame each in most models)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def video_grid(root: nn.Module, latent: Any, time_first: bool = False) -> tuple[int, ...] | None:
    """(frames, h, w) of the patches of a latent; `time_first` where it is [B, frames, channels, h, w]."""
    if not isinstance(latent, torch.Tensor) or latent.ndim != 5:
        return None
    return in_patches(root, latent.shape[1 if time_first else 2], *latent.shape[3:])


def in_patches(root: nn.Module, frames: int, height: int, width: int) -> tuple[int, int, int]:
    """The sides of a latent counted in patches, by the model's config: `patch_size` as one number for height and width,
    with `patch_size_t` beside it or 1, or as three numbers. CogVideoX 1.5 pads its frames to whole patches.
    """
    config = getattr(root, "config", None)
    patch, frames_a_patch = getattr(config, "patch_size", 1), getattr(config, "patch_size_t", None) or 1
    sides = tuple(patch) if isinstance(patch, Sequence) else (frames_a_patch, patch, patch)
    return -(-frames // sides[0]), height // sides[1], width // sides[2]


def default_video_grid(pipe: Any, root: nn.Module) -> tuple[int, ...] | None:
    """The grid at the size that the pipeline's call has as its default, None if that is not in its signature."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    frames, height, width = (
        getattr(parameters.get(name), "default", None) for name in ("num_frames", "height", "width")
    )
    time = _first(pipe, "vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    space = _first(pipe, "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
    if not (isinstance(frames, int) and isinstance(height, int) and isinstance(width, int)) or not (time and space):
        return None
    return in_patches(root, (frames - 1) // time + 1, height // space, width // space)


def _first(pipe: Any, *names: str) -> int | None:
    return next((value for value in (getattr(pipe, name, None) for name in names) if isinstance(value, int)), None)
