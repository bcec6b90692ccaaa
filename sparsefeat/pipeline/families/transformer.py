"""What diffusion transformers have in common. A family's own file says what its blocks are called, which element of
their output is which stream, and how the grid of patches is told from the model's arguments.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Family, Rows, Run, UnknownRowsError


@dataclass(frozen=True)
class Side:
    """The rows of the image's side of a model: those that are made, and tokens of reference images around them."""

    before: int
    made: int
    after: int = 0

    @property
    def total(self) -> int:
        return self.before + self.made + self.after


class Transformer(Family):
    """A transformer of one image stream, whose blocks give the tensor [B, positions, C] itself.

    A subclass names the model's classes and its blocks. The grid is that of a latent [B, channels, h, w] cut into
    patches; a model that is given its latent packed says otherwise.
    """

    runs_in_steps = True
    never_reached = (
        "the model was compiled before this module was hooked, a cache (first block cache, PAB) or `skip_layers` skips "
        "the block, or it was replaced after `attach`: attach first and compile then, or turn the cache off"
    )

    kinds: tuple[tuple[str, str], ...] = ()
    """(kind, pattern of the path) of the blocks worth hooking."""
    joint_streams: tuple[str, ...] = ("image", "text")
    """The streams of what holds several."""
    text_modules = (
        r".*\.(attn2|cross_attention|cross_attn|attn_cross)\.(to_[kv]|norm_k|norm_cross|add_[kv]_proj|to_key|to_value|key_norm)"
        r"(\..*)?|((\w+\.)?text_embed\w*|context_embedder|caption_\w+|txt_\w+)(\..*)?"
    )
    """Paths of modules that see the text only."""
    image_modules = r"(pos_embed|patch_embed(ding)?|x_embedder|img_in|proj_in|norm_out|proj_out)(\..*)?"
    """Paths, outside the blocks, of modules that see the image only."""
    feature_maps = r"(pos_embed|patch_embed(ding)?)\.proj"
    """Paths of modules that work on [B, C, *grid]."""

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            for kind, pattern in self.kinds:
                if re.fullmatch(pattern, path):
                    yield path, kind, module

    def content(self, path: str) -> str | None:
        """What the rows of this module's tensors are: "image", "text", "joint" for both, None if it is not known. The
        model itself (path "") gives what it predicts, which is of the image alone.
        """
        if not path:
            return self.stream
        if re.fullmatch(self.text_modules, path):
            return "text"
        inside = any(re.match(rf"({pattern})(\.|$)", path) for _, pattern in self.kinds)
        return self.stream if inside or re.fullmatch(self.image_modules, path) else None

    def known(self, path: str) -> str | None:
        """`content`, asked once for each path: at every run of a block it would take longer than the rest."""
        contents = self.__dict__.setdefault("_contents", {})
        if path not in contents:
            contents[path] = self.content(path)
        return contents[path]

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        content = self.known(path)
        if content is None:
            raise UnknownRowsError(path, module, "sparsefeat does not know this module of the model")
        return self.joint_streams if content == "joint" else (content,)

    def side(self, run: Run) -> Side | None:
        """The rows of the image's side, None where the model's arguments do not tell them."""
        return None if run.grid is None else Side(0, math.prod(run.grid))

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if self.known(path) == "text":
            if tensor.ndim == 3:
                return 0, None
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)}, which is no text's")
        side = self.side(run)
        if side is None:
            raise UnknownRowsError(
                path, run.root, f"the grid of the {self.stream} was not told by this call's arguments"
            )
        if tensor.ndim > 3 and not path:
            return 0, None  # what it predicts, in the layout of the latents
        if tensor.ndim > 3 and re.fullmatch(self.feature_maps, path) and tuple(tensor.shape[2:]) == run.grid:
            return 0, None
        if tensor.ndim != 3 or tensor.shape[1] != side.total:
            raise UnknownRowsError(
                path, run.root, f"it has the shape {list(tensor.shape)} where the {self.stream} has {side.total} tokens"
            )
        return side.before, side.made

    def width(self, module: nn.Module, io: str) -> int | None:
        return width_of(module, io)

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        latent, patch = arguments.get("hidden_states"), configured(root, "patch_size") or 1
        if not isinstance(latent, torch.Tensor) or latent.ndim != 4:
            return None
        return latent.shape[-2] // patch, latent.shape[-1] // patch

    def grid(self, run: Run, shape: Sequence[int]) -> tuple[int, ...] | None:
        if len(shape) > 3:
            return tuple(shape[2:])
        return run.grid if run.grid is not None and len(shape) == 3 and shape[1] == math.prod(run.grid) else None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        patch, scale = configured(root, "patch_size"), getattr(pipe, "vae_scale_factor", None)
        pixels = [_default(pipe, side) for side in ("height", "width")]
        if all(isinstance(number, int) for number in (patch, scale, *pixels)):  # `__call__` itself has a size
            return pixels[0] // scale // patch, pixels[1] // scale // patch
        size = configured(root, "sample_size")
        return None if size is None or patch is None else (size // patch, size // patch)


def _default(pipe: Any, argument: str) -> Any:
    """What `pipe(...)` takes for an argument that is not given."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(argument)
    return None if parameter is None else parameter.default


def configured(root: nn.Module, name: str) -> int | None:
    """A whole number in the model's config, None where it is something else or not there."""
    value = getattr(getattr(root, "config", None), name, None)
    return value if isinstance(value, int) else None


def width_of(module: nn.Module, io: str) -> int | None:
    """d_model of a block, an attention or a feed-forward of diffusers' transformers, told apart by their attributes."""
    if hasattr(module, "query_dim"):  # attention
        return _integer(getattr(module, "query_dim" if io == "input" else "out_dim", None))
    if isinstance(getattr(module, "net", None), nn.ModuleList):  # FeedForward
        linears = [layer for layer in module.net if hasattr(layer, "out_features")]  # a dropout may come last
        return _integer(linears[-1].out_features) if io == "output" and linears else None
    for name in ("linear_out", "out_projection", "linear_2", "w2"):  # the last layer of the families' own feed-forwards
        if io == "output" and hasattr(module, name):
            return _integer(getattr(getattr(module, name), "out_features", None))
    for name in ("attn", "attn1", "attention"):
        attention = getattr(module, name, None)
        if isinstance(attention, nn.Module):
            return width_of(attention, "input")  # what a block takes in it gives: a residual stream
    return None


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) else None
