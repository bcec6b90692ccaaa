"""Motif-Video: built like HunyuanVideo; the last of its single blocks, its decoder, have for a text what the blocks before
them made of the video.
"""

from __future__ import annotations

import re
from typing import Any

from sparsefeat.pipeline.families.family import Run, UnknownRowsError
from sparsefeat.pipeline.families.hunyuan_video import HunyuanVideo


class MotifVideo(HunyuanVideo):
    classes = ("MotifVideoTransformer3DModel",)

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        single = re.match(r"single_transformer_blocks\.(\d+)", path)
        decoders = getattr(getattr(run.root, "config", None), "num_decoder_layers", 0)
        if single and stream == "text" and int(single[1]) >= len(run.root.single_transformer_blocks) - decoders:
            raise UnknownRowsError(path, run.root, "this block of the decoder has no text")
        return super().output_element(path, stream, output, run)
