"""Wan 2.1 and 2.2 and models built like it (VACE, Animate, SkyReels): blocks that give the video's tensor, with self-attention
(`attn1`), cross-attention to the text (`attn2`) and a feed-forward (`ffn`).

Wan 2.2 A14B is two models, `transformer` for the noisy part of the schedule and `transformer_2` for the rest: a
hookpoint names one of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Side, Transformer
from sparsefeat.pipeline.families.video import default_video_grid, video_grid

_BLOCK = r"(vace_)?blocks\.\d+"


class Wan(Transformer):
    classes = (
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "SkyReelsV2Transformer3DModel",
        "WanAnimateTransformer3DModel",
    )
    kinds = (
        ("transformer_block", r"blocks\.\d+"),
        ("self_attention", _BLOCK + r"\.attn1"),
        ("cross_attention", _BLOCK + r"\.attn2"),
        ("feed_forward", _BLOCK + r"\.ffn"),
    )
    never_reached = (
        "of Wan 2.2's two models only one may have run in this schedule, the model was compiled before this module was "
        "hooked, a cache skips the block, or it was replaced after `attach`: name the other model, take more steps, "
        "or attach first and compile then"
    )

    def side(self, run: Run) -> Side | None:
        """Wan-Animate's video has the reference image for a first frame."""
        if run.grid is None:
            return None
        return Side(math.prod(run.grid[1:]) if self._is_animate(run.root) else 0, math.prod(run.grid))

    @staticmethod
    def _is_animate(root: nn.Module) -> bool:
        return "WanAnimate" in type(root).__name__

    def reads_text(self, path: str, run: Run, index: int) -> bool:
        """Image-to-video attends to the image's tokens first."""
        image = run.arguments.get("encoder_hidden_states_image")
        return index == (1 if image is not None and path.endswith(".attn2") else 0)

    def width(self, module: nn.Module, io: str) -> int | None:
        width = super().width(module, io)
        if width is None and hasattr(module, "to_q"):  # WanAttention does not say how wide it is in every version
            width = getattr(module.to_q, "in_features", None)
        if width is None and hasattr(module, "attn1"):
            return self.width(module.attn1, io)
        return width

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        grid = video_grid(root, arguments.get("hidden_states"))
        return (grid[0] - 1, *grid[1:]) if grid is not None and self._is_animate(root) else grid

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return default_video_grid(pipe, root)
