"""Text encoders: CLIP, CLIP with projection, T5.

They run before the scheduler is set, so nothing here has a step or a grid; a position is a token. transformers 5 took
`text_model` out of `CLIPTextModel` and left it in `CLIPTextModelWithProjection`; published names have it in both.
CLIP's layers return a tensor (a tuple in older versions), T5's blocks a tuple, the hidden states first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from sparsefeat.pipeline.family import Family

_LAYERS = r"((text_model\.)?encoder\.layers|encoder\.block)\.\d+"  # CLIP; T5
_KINDS = (("layer", _LAYERS), ("self_attention", _LAYERS + r"\.self_attn"), ("feed_forward", _LAYERS + r"\.mlp"))


class TextEncoder(Family):
    stream = "text"
    never_reached = (
        "the pipeline did not run its text encoder, as it was given `prompt_embeds`: pass the prompt as text, or "
        "encode it under a session of its own, inside `with session.call(...)`"
    )

    def claims(self, root: nn.Module) -> bool:
        if not any(re.fullmatch(_LAYERS, name) for name, _ in root.named_modules()):
            return False
        embeddings = getattr(root, "get_input_embeddings", lambda: None)()  # an image encoder embeds patches
        return isinstance(embeddings, nn.Embedding)

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            for kind, pattern in _KINDS:
                if re.fullmatch(pattern, path):
                    yield path, kind, module

    def aliases(self, path: str) -> tuple[str, ...]:
        if path.startswith("text_model."):
            return (path.removeprefix("text_model."),)
        return (f"text_model.{path}",)

    def width(self, module: nn.Module, io: str) -> int | None:
        if hasattr(module, "embed_dim"):  # CLIPEncoderLayer, CLIPAttention
            return module.embed_dim
        if hasattr(module, "fc1") and hasattr(module, "fc2"):  # CLIPMLP
            return getattr(module.fc1, "in_features", None)
        for part in module.modules():  # T5Block: its norms are over d_model
            if hasattr(part, "variance_epsilon"):
                return part.weight.shape[0]
        return None
