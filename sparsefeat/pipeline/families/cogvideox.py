"""CogVideoX: joint blocks that give (video, text), where SD3 and FLUX give the text first. Within a block, in its
feed-forward too, the sequence is [text; video]. The latent has its frames before its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.joint import JointTransformer
from sparsefeat.pipeline.families.video import in_patches, video_grid

_BLOCK = r"transformer_blocks\.\d+"


class CogVideoX(JointTransformer):
    classes = ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn1"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )
    block_order = ("image", "text")
    joint_blocks = _BLOCK
    joint_attentions = _BLOCK + r"\.attn1"
    single_blocks = _BLOCK  # inside them both are one sequence

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        return TextLayout()

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return video_grid(root, arguments.get("hidden_states"), time_first=True)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        config = root.config  # the call's own default is None: the model's
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return in_patches(root, frames, config.sample_height, config.sample_width)
