"""The UNets of Stable Diffusion 1.x, 2.x, SDXL and their relatives (ControlNets and inpainting included).

Blocks with attention are `Transformer2DModel`s: [batch, channels, h, w] in, a tuple with the same out. Inside them the
image is a sequence [batch, h * w, channels].
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from sparsefeat.pipeline.families.family import Family, Run

# The kinds of blocks, by their path. A down block's output tuple also carries the skip connections, which an edit of
# its image stream does not reach: to edit what goes through a skip, hook `attentions.j` or `resnets.j`.
_KINDS = (
    ("transformer", r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"),
    ("transformer_block", r".*\.attentions\.\d+\.transformer_blocks\.\d+"),
    ("self_attention", r".*\.transformer_blocks\.\d+\.attn1"),
    ("cross_attention", r".*\.transformer_blocks\.\d+\.attn2"),
    ("feed_forward", r".*\.transformer_blocks\.\d+\.ff"),
    ("resnet", r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+"),
    ("block", r"down_blocks\.\d+|mid_block|up_blocks\.\d+"),
)


class UNet(Family):
    runs_in_steps = True
    never_reached = (
        "the model was compiled before this module was hooked, a cache (DeepCache, PAB) skips the block, or it was "
        "replaced after `attach`: attach first and compile then, or turn the cache off"
    )

    def claims(self, root: nn.Module) -> bool:
        return hasattr(root, "down_blocks") and hasattr(root, "mid_block")

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            for kind, pattern in _KINDS:
                if re.fullmatch(pattern, path):
                    yield path, kind, module

    def width(self, module: nn.Module, io: str) -> int | None:
        # The attribute names are those of diffusers' classes, by which they can be told apart.
        if hasattr(module, "transformer_blocks"):  # Transformer2DModel
            return _integer(getattr(module, "in_channels", None))
        if hasattr(module, "attn1"):  # BasicTransformerBlock
            return _integer(getattr(module, "dim", None))
        if hasattr(module, "to_q"):  # Attention
            return _integer(getattr(module, "query_dim" if io == "input" else "out_dim", None))
        if hasattr(module, "conv_shortcut"):  # ResnetBlock2D
            return _integer(getattr(module, "in_channels" if io == "input" else "out_channels", None))
        if hasattr(module, "resnets") and io == "output":  # down, mid and up blocks
            return self.width(module.resnets[-1], io)
        if type(module).__name__ == "FeedForward" and io == "output":
            return _integer(getattr(module.net[-1], "out_features", None))
        return None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        sample = arguments.get("sample")
        return tuple(sample.shape[-2:]) if sample is not None and sample.ndim == 4 else None

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        """A feature map carries its grid. A sequence of n positions belongs to the level of the UNet with h * w == n:
        each level halves the sample's sides, rounding up, so their areas differ and the level is never ambiguous.
        """
        if len(shape) > 3:
            return tuple(shape[2:])
        if len(shape) < 3 or run.grid is None:
            return None
        height, width = run.grid
        while height * width > shape[1] and (height, width) != (1, 1):
            height, width = (height + 1) // 2, (width + 1) // 2
        return (height, width) if height * width == shape[1] else None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        size = getattr(getattr(root, "config", None), "sample_size", None)
        size = (size, size) if isinstance(size, int) else size
        if not isinstance(size, (list, tuple)) or len(size) != 2:
            return None
        part, _, index = path.partition(".")
        levels = len(root.down_blocks)
        level = {"down_blocks": 0, "mid_block": levels - 1, "up_blocks": levels - 1}.get(part)
        if level is None:
            return None
        number, _, inside = index.partition(".")
        if part != "mid_block":
            level += int(number) if part == "down_blocks" else -int(number)
            if not inside:  # the block's output has gone through its downsampler or upsampler
                level += _halves(root.down_blocks[level]) if part == "down_blocks" else 0
                level -= _halves(root.get_submodule(path)) if part == "up_blocks" else 0
        height, width = size
        for _ in range(level):
            height, width = (height + 1) // 2, (width + 1) // 2
        return height, width


def _halves(block: nn.Module) -> bool:
    return bool(getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None))


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
