"""HunyuanVideo 1.0 and 1.5: double blocks, in 1.0 single blocks after them, all of which give (video, text); in their
attention the video comes first. Not the blocks of `context_embedder.token_refiner`, which prepare the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout, UnknownRowsError
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.reading import read_once
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_DOUBLE, _SINGLE = r"transformer_blocks\.\d+", r"single_transformer_blocks\.\d+"


def _has_glyphs(root: nn.Module) -> bool:
    return getattr(root, "context_embedder_2", None) is not None


def _kept(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.bool().sum(1).tolist())


def _is_anything(embeds: torch.Tensor) -> bool:
    return bool((embeds != 0).any())


class HunyuanVideo(JointTransformer):
    classes: tuple[str, ...] = ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel")
    kinds = (
        ("joint_block", _DOUBLE),
        ("joint_attention", _DOUBLE + r"\.attn"),
        ("feed_forward", _DOUBLE + r"\.ff"),
        ("text_feed_forward", _DOUBLE + r"\.ff_context"),
        ("single_block", _SINGLE),
        ("joint_attention", _SINGLE + r"\.attn"),
    )
    block_order = ("image", "text")
    text_first = False
    joint_attentions = rf"({_DOUBLE}|{_SINGLE})\.attn"

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        """Where ByT5 reads what stands in quotes: an image's tokens and ByT5's are before the prompt's, and what either
        encoder's mask leaves out is behind them."""
        streams = super().attention_streams(path, run, queries)
        masks = run.arguments.get("encoder_attention_mask"), run.arguments.get("encoder_attention_mask_2")
        quoted = _has_glyphs(run.root) and run.arguments.get("encoder_hidden_states_2") is not None
        if not (quoted and isinstance(streams, dict) and "text" in streams):
            return streams
        if not all(isinstance(mask, torch.Tensor) for mask in masks):
            raise UnknownRowsError(path, run.root, "which of its texts' rows are padding was not given")
        own, glyphs = (read_once(_kept, mask) for mask in masks)
        given = run.arguments.get("image_embeds")
        of_image = given.shape[1] if isinstance(given, torch.Tensor) and read_once(_is_anything, given) else 0
        start = streams["text"][0] + of_image
        each = tuple(
            {"image": streams["image"], "text": (start + g, start + g + kept)}
            for kept, g in zip(own, glyphs, strict=True)
        )
        return each[0] if all(one == each[0] for one in each) else each

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout | None:
        if _has_glyphs(root):
            cropped = getattr(pipe, "prompt_template_encode_start_idx", None)
            padded = getattr(getattr(pipe, "tokenizer", None), "padding_side", None)
            if not isinstance(cropped, int) or padded != "right":
                return None
            return TextLayout(dropped=cropped, packed=True, more=True)
        template = call.get("prompt_template")
        cropped = template.get("crop_start") if isinstance(template, Mapping) else None
        return None if cropped is None else TextLayout(dropped=cropped)

    def text_tokens(self, run: Run) -> int | None:
        return None  # 1.5 puts the tokens of its second encoder and of an image beside them: what is not video is text

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"))

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
