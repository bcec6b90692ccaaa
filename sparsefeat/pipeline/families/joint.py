"""Transformers with an image and a text stream that attend to each other (MM-DiT): SD3, FLUX, Qwen-Image and others.

Their blocks give both streams as a tuple. Within a block, and in the single-stream blocks that follow, image and text
are one sequence, [text; image] or [image; text] as the family says, of which the rows of one stream are meant. The
tokens of reference images (Kontext, FLUX.2, Qwen-Image-Edit) come after those of the image that is being made and are
not part of the image stream: they have no place in its grid.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run
from sparsefeat.pipeline.families.transformer import Transformer
from sparsefeat.pipeline.part import Part


class JointTransformer(Transformer):
    """What is said here holds for FLUX; a family says what is otherwise in it."""

    block_order: tuple[str, ...] = ("text", "image")
    """What the elements of a block's output tuple are."""
    attention_order: tuple[str, ...] = ("image", "text")
    """What those of an attention module's are; an IP-Adapter's come after."""
    text_first = True
    """Which comes first where both are one sequence."""
    joint_blocks = r"(single_)?transformer_blocks\.\d+"
    """Paths of the blocks that have both streams."""
    joint_attentions = r"transformer_blocks\.\d+\.attn"
    text_modules = r".*\.(ff_context|norm\d_context)(\..+)?"
    """Paths of modules that see the text only."""
    argument_names = (("image", "hidden_states"), ("text", "encoder_hidden_states"))

    def streams(self, path: str, module: nn.Module) -> tuple[str, ...]:
        if re.fullmatch(self.text_modules, path):
            return ("text",)
        joint = re.fullmatch(self.joint_blocks, path) or re.fullmatch(self.joint_attentions, path)
        return ("image", "text") if joint else ("image",)

    def stream_at(self, path: str, module: nn.Module, wanted: str) -> str | None:
        streams = self.streams(path, module)
        if wanted == "image":  # also what nobody asked for: the only stream of a text module
            return "image" if "image" in streams else streams[0]
        return wanted if wanted in streams else None

    def image_tokens(self, run: Run) -> int | None:
        """How many image tokens run through the blocks, those of reference images included."""
        packed = run.arguments.get("hidden_states")
        if isinstance(packed, torch.Tensor) and packed.ndim == 3:
            return packed.shape[1]
        return None if run.grid is None else math.prod(run.grid)

    def output_part(self, path: str, stream: str, output: Any, run: Run) -> Part:
        order: tuple[str, ...] = ()
        if isinstance(output, (tuple, list)) and len(output) > 1:
            if re.fullmatch(self.joint_attentions, path):
                order = self.attention_order
            elif re.fullmatch(self.joint_blocks, path):
                order = self.block_order
        index = order.index(stream) if order else 0
        tensor = output[index] if isinstance(output, (tuple, list)) and output else output
        start, length = self._rows(path, stream, tensor, run, apart=bool(order))
        return Part(index, None, start, length)

    def input_part(self, path: str, stream: str, given: Callable[[str | None], Any], run: Run) -> Part:
        image, text = (name for _, name in self.argument_names)
        name: str | None = dict(self.argument_names)[stream]
        apart = isinstance(given(text), torch.Tensor)
        if not isinstance(given(name), torch.Tensor):  # one sequence of both, or a part of a block with other names
            name = image if isinstance(given(image), torch.Tensor) else None
        start, length = self._rows(path, stream, given(name), run, apart)
        return Part(0, name, start, length)

    def attention_streams(self, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        image = self.image_tokens(run)
        if image is None or queries <= image:
            return {}
        rows = {"image": self._image_rows(queries, image, run), "text": self._text_rows(queries, image)}
        return {stream: (start, start + length) for stream, (start, length) in rows.items()}

    def _rows(self, path: str, stream: str, tensor: Any, run: Run, apart: bool) -> tuple[int, int | None]:
        """(start, length) of the stream's rows in a sequence that holds it `apart`, or perhaps with the other one."""
        image = self.image_tokens(run)
        if image is None or not isinstance(tensor, torch.Tensor) or tensor.ndim != 3:
            return 0, None
        length = tensor.shape[1]
        if stream == "text":
            alone = apart or length <= image or re.fullmatch(self.text_modules, path)
            return (0, None) if alone else self._text_rows(length, image)
        return (0, None) if length < image else self._image_rows(image if apart else length, image, run)

    def _text_rows(self, length: int, image: int) -> tuple[int, int]:
        return (0 if self.text_first else image), length - image

    def _image_rows(self, length: int, image: int, run: Run) -> tuple[int, int]:
        made = image if run.grid is None else min(image, math.prod(run.grid))  # the rest are reference images
        return (length - image if self.text_first else 0), made
