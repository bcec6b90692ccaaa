"""The priors of unCLIP and Kandinsky 2: they make an image's embedding from a text's. One sequence runs through their
blocks: [text tokens; text embedding; time; the embedding that is made; the token it is predicted at].

The image stream is the last two, an embedding and no picture: it has no grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Rows, Run, UnknownRowsError
from sparsefeat.pipeline.families.transformer import Transformer

_BLOCK = r"transformer_blocks\.\d+"


class Prior(Transformer):
    classes = ("PriorTransformer",)
    kinds = (
        ("joint_block", _BLOCK),
        ("joint_attention", _BLOCK + r"\.attn1"),
        ("feed_forward", _BLOCK + r"\.ff"),
    )

    def content(self, path: str) -> str | None:
        return "joint" if super().content(path) == self.stream and path.startswith("transformer_blocks.") else None

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        before, made = _tokens(run, "encoder_hidden_states"), _tokens(run, "hidden_states")
        made += getattr(run.root, "prd_embedding", None) is not None
        between = _tokens(run, "proj_embedding") + 1  # and the time's
        if tensor.ndim != 3 or tensor.shape[1] != before + between + made:
            raise UnknownRowsError(
                path,
                run.root,
                f"it has the shape {list(tensor.shape)} where there are {before + between + made} tokens",
            )
        return (0, before) if stream == "text" else (before + between, made)

    def image_grid(self, root: nn.Module, arguments: Mapping[str, Any]) -> tuple[int, ...] | None:
        return None

    def default_grid(self, pipe: Any, root: nn.Module, path: str) -> tuple[int, ...] | None:
        return None


def _tokens(run: Run, name: str) -> int:
    """How many tokens this argument of the model is: a vector is one."""
    given = run.arguments.get(name)
    if not isinstance(given, torch.Tensor):
        return 0
    return given.shape[1] if given.ndim == 3 else 1
