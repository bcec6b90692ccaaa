"""OmniGen: layers over one sequence [text and images that were given; time; image that is made]."""

from __future__ import annotations

import math

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, UnknownRowsError
from sparsefeat.pipeline.families.transformer import Transformer

_LAYER = r"layers\.\d+"


class OmniGen(Transformer):
    classes = ("OmniGenTransformer2DModel",)
    kinds = (
        ("single_block", _LAYER),
        ("joint_attention", _LAYER + r"\.self_attn"),
        ("feed_forward", _LAYER + r"\.mlp"),
    )
    image_modules = r"(norm_out|proj_out)(\..*)?"

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if not path.startswith("layers."):
            return super().rows(path, stream, tensor, run, apart)
        start, _ = self.attention_streams(path, run, tensor.shape[1] if tensor.ndim == 3 else 0)["image"]
        return start, tensor.shape[1] - start

    def reads_text_at(self, root: nn.Module, path: str) -> bool:
        return False  # a template and given images are between the words

    def attention_streams(self, path: str, run: Run, queries: int) -> dict[str, tuple[int, int]]:
        made, ids = None if run.grid is None else math.prod(run.grid), run.arguments.get("input_ids")
        given = ids.shape[1] + 1 if isinstance(ids, torch.Tensor) else 1
        if made is None or queries != given + made:
            raise UnknownRowsError(
                path, run.root, f"it has {queries} rows where {given} come before an image of {made}"
            )
        return {"image": (given, queries)}

    def width(self, module: nn.Module, io: str) -> int | None:
        return super().width(getattr(module, "self_attn", module), io)
