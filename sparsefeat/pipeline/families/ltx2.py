"""LTX-2: blocks that give (video, audio), two streams that attend to each other. Both latents come packed; frames, height
and width of the video are arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, UnknownRowsError
from sparsefeat.pipeline.families.ltx import LTX

_BLOCK = r"transformer_blocks\.\d+"
_AUDIO = rf"({_BLOCK}\.)?(audio_(norm\d|attn\d|ff|proj_in|norm_out|proj_out)|video_to_audio_norm)(\..*)?|{_BLOCK}\.video_to_audio_attn"
# Its queries are of one stream and its keys of the other: only what goes in and comes out is told apart.
_ACROSS = rf"{_BLOCK}\.(audio_to_video_attn|video_to_audio_attn)\..*"


class LTX2(LTX):
    classes = ("LTX2VideoTransformer3DModel",)
    kinds = (
        ("joint_block", _BLOCK),
        *(
            (kind, rf"{_BLOCK}\.{prefix}{name}")
            for prefix in ("", "audio_")
            for kind, name in (("self_attention", "attn1"), ("cross_attention", "attn2"), ("feed_forward", "ff"))
        ),
    )
    joint_streams = ("image", "audio")
    text_modules = rf"{_BLOCK}\.(audio_)?attn2\.(to_[kv]|norm_k)(\..*)?|(audio_)?caption_projection(\..*)?"

    def content(self, path: str) -> str | None:
        if re.fullmatch(_BLOCK, path):
            return "joint"
        if re.fullmatch(self.text_modules, path):
            return "text"
        if re.fullmatch(_AUDIO, path):
            return "audio"
        return None if re.fullmatch(_ACROSS, path) else super().content(path)

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return super().reads_text_at(root, path) and not re.fullmatch(_AUDIO, path)

    def output_element(self, path: str, stream: str, output: Any, run: Run) -> int:
        return 1 if re.fullmatch(_BLOCK, path) and stream == "audio" else 0

    def input_argument(self, path: str, stream: str, given: Callable[[str | None], Any]) -> tuple[str | None, bool]:
        return ("audio_hidden_states" if re.fullmatch(_BLOCK, path) and stream == "audio" else None), False

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if stream != "audio":
            return super().rows(path, stream, tensor, run, apart)
        audio = run.arguments.get("audio_hidden_states")
        if tensor.ndim != 3 or not isinstance(audio, torch.Tensor) or tensor.shape[1] != audio.shape[1]:
            raise UnknownRowsError(path, run.root, f"it has the shape {list(tensor.shape)}, which is not the audio's")
        return 0, None

    def width(self, module: nn.Module, io: str) -> int | None:
        if hasattr(module, "to_q") and hasattr(module, "to_out"):
            return module.to_q.in_features if io == "input" else module.to_out[0].out_features
        return None if hasattr(module, "audio_attn1") else super().width(module, io)  # two streams, two widths
