"""The UNets of Stable Diffusion 1.x, 2.x, SDXL and their relatives (ControlNets and inpainting included), and those of
videos that grew from them (AnimateDiff, Stable Video Diffusion, I2VGen-XL, ModelScope).

Blocks with attention are `Transformer2DModel`s: [batch, channels, h, w] in, a tuple with the same out. Inside them the
image is a sequence [batch, h * w, channels]. A video's frames are folded into the batch, [batch * frames, channels, h, w],
and are positions of their video here; inside the temporal transformers its rows are [batch * h * w, frames, channels],
an order that no grid describes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Extent, Family, Rows, Run, UnknownRowsError

# The kinds of blocks, by their path. A down block's output tuple also carries the skip connections, which an edit of
# its image stream does not reach: to edit what goes through a skip, hook `attentions.j` or `resnets.j`.
_KINDS = (
    ("motion_module", r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.(motion_modules|temp_attentions)\.\d+"),
    ("transformer", r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+"),
    ("transformer_block", r".*\.attentions\.\d+\.transformer_blocks\.\d+"),
    ("self_attention", r".*\.transformer_blocks\.\d+\.attn1"),
    ("cross_attention", r".*\.transformer_blocks\.\d+\.attn2"),
    ("feed_forward", r".*\.transformer_blocks\.\d+\.ff"),
    ("resnet", r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.resnets\.\d+"),
    ("block", r"down_blocks\.\d+|mid_block|up_blocks\.\d+"),
)

_TEXT = r"(.*\.attn2\.(to_[kv]|norm_k|add_[kv]_proj|norm_cross)|encoder_hid_proj)(\..*)?"
# Transformers over time, of which a row is a frame; but the modules themselves take and give feature maps.
_TEMPORAL = r"\.(motion_modules|temp_attentions)\.\d+\.transformer_blocks\.|transformer_in\.transformer_blocks\.|\.temporal_transformer_blocks\.\d+\."
# The UNets of videos; the last has its sample's frames before its channels.
_VIDEO = "Motion|3D|I2VGen|SpatioTemporal|SparseControlNet"


def _frames(root: nn.Module, sample: torch.Tensor) -> int:
    return sample.shape[1 if "SpatioTemporal" in type(root).__name__ else 2]


class UNet(Family):
    runs_in_steps = True
    never_reached = (
        "the model was compiled before this module was hooked, a cache (DeepCache, PAB) skips the block, or it was "
        "replaced after `attach`: attach first and compile then, or turn the cache off"
    )

    classes: tuple[str, ...] = (
        "UNet2DModel",
        "UNet2DConditionModel",
        "UNet3DConditionModel",
        "UNetMotionModel",
        "UNetSpatioTemporalConditionModel",
        "I2VGenXLUNet",
        "ControlNetModel",
        "ControlNetUnionModel",
        "SparseControlNetModel",
    )

    def claims(self, root: nn.Module) -> bool:
        """Those of diffusers by their names; what wraps one, or is built like one, by its parts."""
        own = type(root).__module__.startswith("diffusers.")
        return super().claims(root) or (
            not own and all(hasattr(root, part) for part in ("conv_in", "down_blocks", "mid_block"))
        )

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

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        return ("text",) if re.fullmatch(_TEXT, path) else ("image",)

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if stream == "text" and tensor.ndim == 3:
            return 0, None
        if stream == "image" and (tensor.ndim > 3 or self._is_sequence(path, run, tensor.shape)):
            return 0, None
        raise UnknownRowsError(
            path, run.root, f"it has the shape {list(tensor.shape)}, which is no feature map and no sequence of one"
        )

    def _is_sequence(self, path: str, run: Run, shape: Sequence[int]) -> bool:
        if len(shape) != 3 or run.grid is None:
            return False
        if re.search(_TEMPORAL, path):
            batch, frames = shape[0] // math.prod(run.grid[:-2]), run.grid[0]
            return len(run.grid) == 3 and shape[1] == frames and batch >= 1
        return self._level(run, shape[1]) is not None

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        sample = arguments.get("sample")
        if not isinstance(sample, torch.Tensor) or sample.ndim not in (4, 5):
            return None
        return (_frames(root, sample), *sample.shape[-2:]) if sample.ndim == 5 else tuple(sample.shape[-2:])

    def check_whole(self, pipe: Any, call: Mapping[str, Any], run: Run) -> None:
        """Tiles (StableDiffusionPanoramaPipeline's views) have a grid of their own, and all of them are the same image; a
        reference beside the image that is made is not that image. A pass at a higher resolution is, larger in both
        directions alike.
        """
        scale = getattr(pipe, "vae_scale_factor", None)
        pixels = [side for side in (call.get("height"), call.get("width")) if isinstance(side, int)]
        if run.grid is None or not isinstance(scale, int) or len(pixels) < 2:
            return
        whole, given = tuple(side // scale for side in pixels), run.grid[-2:]
        if whole[0] * given[1] == whole[1] * given[0] and whole <= given:
            return
        what = "on a tile of" if all(a <= b for a, b in zip(given, whole, strict=True)) else "on more than the image,"
        raise ValueError(
            f"{type(pipe).__name__} ran its {type(run.root).__name__} {what} {given} where a latent of {whole} was asked "
            f"for, so which rows are where in the image cannot be told: ask for the size that it runs on, "
            f"{given[0] * scale} x {given[1] * scale}, or attach to a pipeline that runs on the image alone"
        )

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        """A feature map carries its grid. A sequence of n positions belongs to the level of the UNet with h * w == n:
        each level halves the sample's sides, rounding up, so their areas differ and the level is never ambiguous.
        """
        if len(shape) > 3:
            return tuple(shape[2:])
        return self._level(run, shape[1]) if len(shape) == 3 else None

    @staticmethod
    def _level(run: Run, positions: int) -> tuple[int, int] | None:
        if run.grid is None:
            return None
        height, width = run.grid[-2:]
        while height * width > positions and (height, width) != (1, 1):
            height, width = (height + 1) // 2, (width + 1) // 2
        return (height, width) if height * width == positions else None

    def extent(self, path: str, stream: str, run: Run, shape: Sequence[int]) -> Extent:
        """Of a video the frames, and in a temporal transformer the places of a frame, are folded into the batch."""
        extent = super().extent(path, stream, run, shape)
        sample = run.arguments.get("sample")
        if run.grid is None or len(run.grid) != 3 or sample is None or shape[0] == sample.shape[0]:
            return extent
        batch, frames = sample.shape[0], run.grid[0]
        folded = shape[0] // batch
        if shape[0] % batch or (re.search(_TEMPORAL, path) is None and folded != frames):
            raise UnknownRowsError(path, run.root, f"{shape[0]} entries are not {batch} videos of {frames} frames")
        grid = None if extent.grid is None or folded != frames else (frames, *extent.grid)
        if re.search(_TEMPORAL, path) and len(shape) == 3:
            grid = None
        return Extent(batch, folded * extent.positions, grid)

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        if re.search(_VIDEO, type(root).__name__):
            return None  # the number of frames is the call's
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
