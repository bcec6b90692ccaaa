"""Motif-Video: built like HunyuanVideo; the last of its single blocks, its decoder, have for a text what the blocks before
them made of the video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Run, TextLayout, UnknownRowsError
from sparsefeat.pipeline.families.hunyuan_video import HunyuanVideo


class MotifVideo(HunyuanVideo):
    classes = ("MotifVideoTransformer3DModel",)

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return super().reads_text_at(root, path) and not self._decodes(root, path)

    def _decodes(self, root: nn.Module, path: str) -> bool:
        single = re.match(r"single_transformer_blocks\.(\d+)", path)
        decoders = getattr(getattr(root, "config", None), "num_decoder_layers", 0)
        singles: Any = root.single_transformer_blocks
        return single is not None and int(single[1]) >= len(singles) - decoders

    def attention_streams(
        self, path: str, run: Run, queries: int
    ) -> dict[str, tuple[int, int]] | tuple[dict[str, tuple[int, int]], ...]:
        """The tokens of a first frame are before the prompt's."""
        streams = super().attention_streams(path, run, queries)
        given = run.arguments.get("image_embeds")
        if not isinstance(given, torch.Tensor) or not isinstance(streams, dict) or "text" not in streams:
            return streams
        start, stop = streams["text"]
        return streams | {"text": (start + given.shape[1], stop)}

    def text_layout(self, pipe: Any, root: nn.Module, call: Mapping[str, Any]) -> TextLayout:
        return TextLayout()

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        if stream == "text" and self._decodes(run.root, path):
            raise UnknownRowsError(path, run.root, "this block of the decoder has no text")
        return super().output_element(path, stream, output, run)
