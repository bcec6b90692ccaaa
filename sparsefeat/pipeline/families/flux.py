"""FLUX.1 and models built like it (Chroma, Ovis): double blocks that give (text, image), then single blocks over both.

A single block gives (text, image) since diffusers 0.35 and one tensor [text; image] before; which one is told by its
type. The latent comes packed, so the grid is read from the position ids: (0, y, x) for each token of the image that is
being made, with another first number for those of a reference image (Kontext), wherever they stand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.reading import read_once
from sparsefeat.pipeline.families.transformer import Side

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"


class Flux(JointTransformer):
    classes: tuple[str, ...] = (
        "FluxTransformer2DModel",
        "FluxControlNetModel",
        "ChromaTransformer2DModel",
        "OvisImageTransformer2DModel",
    )
    kinds: tuple[tuple[str, str], ...] = (
        ("joint_block", _DOUBLE),
        ("joint_attention", _DOUBLE + r"\.attn"),
        ("feed_forward", _DOUBLE + r"\.ff"),
        ("text_feed_forward", _DOUBLE + r"\.ff_context"),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
    )
    joint_attentions = rf"({_DOUBLE}|{_SINGLE})\.attn"
    position_ids = "img_ids"
    """The argument that has the position ids of the image's side."""

    made_id = 0
    """The first of the position ids of the image that is made."""

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        told = self._told_by_ids(arguments)
        return None if told is None else told.grid

    def side(self, run: Run) -> Side | None:
        told = self._told_by_ids(run.arguments)
        return None if told is None else told.side

    def _told_by_ids(self, arguments: Mapping[str, Any]) -> Ids | None:
        ids = arguments.get(self.position_ids)
        if not isinstance(ids, torch.Tensor):
            return None
        return read_once(told_by_ids, ids, self.made_id, self.n_tokens(arguments))

    def n_tokens(self, arguments: Mapping[str, Any]) -> int | None:
        """How many of the position ids, the last of them, are of the image's side; None for all."""
        return None

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        if getattr(pipe, "text_encoder_2", None) is not None:  # T5; CLIP's text is one vector
            return TextLayout((("text_encoder_2",),))
        template = getattr(pipe, "user_prompt_begin_id", None)  # Ovis puts words before the prompt, and leaves them out
        if isinstance(template, int):
            return TextLayout(dropped=template)
        return TextLayout() if "Chroma" in type(root).__name__ else None

    def text_tokens(self, run: Run) -> int | None:
        text = super().text_tokens(run)  # a union ControlNet puts a token for its mode before them
        return text + 1 if text and getattr(run.root, "union", False) else text

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size = getattr(pipe, "default_sample_size", None)  # of the latent, before 2 x 2 of it are packed into a token
        return (size // 2, size // 2) if isinstance(size, int) else None


@dataclass(frozen=True)
class Ids:
    """What the position ids of a sequence tell."""

    grid: tuple[int, int]
    side: Side


def told_by_ids(ids: torch.Tensor, made: int = 0, n_tokens: int | None = None) -> Ids | None:
    """The grid (h, w) of the image that is made and where its tokens stand, from position ids [tokens, (which image, y,
    x, ...)], of which the last `n_tokens` count. Waits for the device once. None where those of image `made` are not one
    full rectangle in row-major order.
    """
    if ids.ndim < 2 or ids.shape[-1] < 3:
        return None
    ids = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    ids = ids[len(ids) - n_tokens :] if n_tokens is not None else ids
    (places,) = (ids[:, 0] == made).nonzero(as_tuple=True)
    if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
        return None
    (height, y), (width, x) = (_counted(ids[places, column]) for column in (1, 2))
    if height * width != len(places) or not torch.equal(y * width + x, torch.arange(len(places))):
        return None
    return Ids((height, width), Side(int(places[0]), len(places), len(ids) - int(places[-1]) - 1))


def _counted(positions: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many places there are along a side, and which of them each position is: they have one distance, which FLUX.3
    scales. 0 places where they do not.
    """
    places, index = positions.double().unique(return_inverse=True)
    steps = places.diff()
    return (len(places) if len(steps) == 0 or steps.max() < 1.5 * steps.min() else 0), index
