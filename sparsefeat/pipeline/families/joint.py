"""Transformers with an image and a text stream that attend to each other (MM-DiT): SD3, FLUX, Qwen-Image and others.

Their blocks give both streams as a tuple. Within a block, and in the single-stream blocks that follow, image and text
are one sequence, [text; image] or [image; text] as the family says, of which the rows of one stream are meant. The
tokens of reference images (Kontext, FLUX.2, Qwen-Image-Edit) stand before or after those of the image that is being made
and are not part of the image stream: they have no place in its grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch

from sparsefeat.pipeline.families.family import Rows, Run, UnknownRowsError
from sparsefeat.pipeline.families.transformer import Side, Transformer


class JointTransformer(Transformer):
    """What is said here holds for FLUX; a family says what is otherwise in it."""

    turns_queries = True
    block_order: tuple[str, ...] = ("text", "image")
    """What the elements of a block's output tuple are."""
    attention_order: tuple[str, ...] = ("image", "text")
    """What those of an attention module's are; an IP-Adapter's come after."""
    text_first = True
    """Which comes first where both are one sequence."""
    joint_blocks = r"(single_)?transformer_blocks\.\d+"
    """Paths of the blocks that have both streams."""
    joint_attentions = r"transformer_blocks\.\d+\.attn"
    single_blocks = r"single_transformer_blocks\.\d+"
    """Paths of the blocks inside which both are one sequence."""
    text_parts = (
        r"(ff_context|txt_\w+|norm\d?_context|attn\d?\.(add_[qkv]_proj|to_added_qkv|to_add_out|norm_added_[qk]))(\..*)?"
    )
    """The modules of a block with two streams apart that see the text only, and those that see the image only."""
    image_parts = r"(ff|img_\w+|norm\d?|attn\d?\.(to_[qkv]|to_qkv|norm_[qk]|to_out(\.\d+)?))(\..*)?"
    argument_names = (("image", "hidden_states"), ("text", "encoder_hidden_states"))

    def content(self, path: str) -> str | None:
        if path and re.fullmatch(rf"({self.joint_blocks})|({self.joint_attentions})", path):
            return "joint"
        if re.match(rf"({self.single_blocks})\.", path):
            return "joint"
        block = re.match(rf"({self.joint_blocks})\.(.*)", path)
        if block:
            part = block.groups()[-1]
            if re.fullmatch(self.text_parts, part):
                return "text"
            if re.fullmatch(self.image_parts, part):
                return "image"
            return None
        return super().content(path)

    def side(self, run: Run) -> Side | None:
        """Reference tokens come after the image that is made: what runs through the blocks beyond its grid."""
        if run.grid is None:
            return None
        packed, made = run.arguments.get("hidden_states"), math.prod(run.grid)
        total = packed.shape[1] if isinstance(packed, torch.Tensor) and packed.ndim == 3 else made
        return Side(0, made, total - made) if total >= made else None

    def text_tokens(self, run: Run) -> int | None:
        """How many text tokens run through the blocks; None where the arguments do not tell."""
        text = run.arguments.get("encoder_hidden_states")
        return 0 if text is None else text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else None

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        if isinstance(output, (tuple, list)) and len(output) > 1:
            if re.fullmatch(self.joint_attentions, path):
                return self.attention_order.index(stream)
            if re.fullmatch(self.joint_blocks, path):
                return self.block_order.index(stream)
        return 0

    def input_argument(self, path: str, stream: str, given: Callable[[str | None], Any]) -> tuple[str | None, bool]:
        names = dict(self.argument_names)
        name: str | None = names[stream]
        apart = isinstance(given(names["text"]), torch.Tensor)
        if not isinstance(given(name), torch.Tensor):  # one sequence of both, or a part of a block with other names
            name = names["image"] if isinstance(given(names["image"]), torch.Tensor) else None
        return name, apart

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        content = self.known(path)
        if content is not None and content != "joint":
            return super().rows(path, stream, tensor, run, apart)
        if tensor.ndim != 3:
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)}, which is no sequence")
        side, length = self._sides(path, run), tensor.shape[1]
        text = self.text_tokens(run)
        if not apart or not re.fullmatch(rf"({self.joint_blocks})|({self.joint_attentions})", path):
            start, stop = self._split(path, side, text, length, run)[stream]
            return start, stop - start
        expected = side.total if stream == "image" else text
        if expected is not None and length != expected:
            raise UnknownRowsError(
                path, run.root, f"it has {length} rows where the {stream} stream has {expected} tokens"
            )
        return (side.before, side.made) if stream == "image" else (0, None)

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        side, text = self._sides(path, run), self.text_tokens(run)
        if self.known(path) == "joint" and queries != side.total:
            return self._split(path, side, text, queries, run)
        if queries != side.total:
            raise UnknownRowsError(path, run.root, f"it has {queries} queries where the image has {side.total} tokens")
        alone = not (side.before or side.after)
        return {} if alone else {"image": (side.before, side.before + side.made)}

    def _sides(self, path: str, run: Run) -> Side:
        side = self.side(run)
        if side is None:
            raise UnknownRowsError(path, run.root, "the grid of the image was not told by this call's arguments")
        return side

    def _split(self, path: str, side: Side, text: int | None, length: int, run: Run) -> dict[str, tuple[int, int]]:
        """(start, stop) of each stream in one sequence of both."""
        text = length - side.total if text is None else text
        if text < 0 or length != side.total + text:
            raise UnknownRowsError(
                path, run.root, f"it has {length} rows where the image has {side.total} tokens and the text {text}"
            )
        start = text if self.text_first else 0
        made = start + side.before
        first = 0 if self.text_first else side.total
        return {"image": (made, made + side.made), "text": (first, first + text)}
