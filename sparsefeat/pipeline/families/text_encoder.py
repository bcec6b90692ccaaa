"""Text encoders: CLIP, CLIP with projection, T5 and UMT5, BERT, and language models (Gemma, Qwen, Llama, Mistral), with
a vision tower beside the language model or without.

They run before the scheduler is set, so nothing here has a step or a grid; a position is a token, and the tokens of a
template around the prompt are positions like others, even if the pipeline drops them afterwards. transformers 5 took
`text_model` out of `CLIPTextModel` and left it in `CLIPTextModelWithProjection`; 4.52 moved the layers of models with a
vision tower into `model.language_model`. Published names have them all. Layers return a tensor, in older versions and
for T5 a tuple, the hidden states first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from sparsefeat.pipeline.families.family import Family, Rows, Run, UnknownRowsError

# CLIP; T5; BERT; language models by themselves, with a head, and inside a model that also sees.
_PREFIXES = ("", "text_model.", "model.", "language_model.", "model.language_model.", "language_model.model.")
_LAYERS = (
    r"((text_model\.)?encoder\.layers|encoder\.block|encoder\.layer|(model\.)?(language_model\.)?(model\.)?layers)\.\d+"
)
_KINDS = (("layer", _LAYERS), ("self_attention", _LAYERS + r"\.self_attn"), ("feed_forward", _LAYERS + r"\.mlp"))


class TextEncoder(Family):
    stream = "text"
    makes_embeddings = True
    never_reached = (
        "the pipeline did not run its text encoder, as it was given `prompt_embeds`: pass the prompt as text, or "
        "encode it under a session of its own, inside `with session.call(...)`"
    )

    def claims(self, root: nn.Module) -> bool:
        if not any(re.fullmatch(_LAYERS, name) for name, _ in root.named_modules()):
            return False
        try:
            embeddings = root.get_input_embeddings()  # an image encoder embeds patches
        except (AttributeError, NotImplementedError):
            return False
        return isinstance(embeddings, nn.Embedding)

    def blocks(self, root: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
        for path, module in root.named_modules():
            for kind, pattern in _KINDS:
                if re.fullmatch(pattern, path):
                    yield path, kind, module

    def aliases(self, path: str) -> tuple[str, ...]:
        stem = next((path.removeprefix(prefix) for prefix in reversed(_PREFIXES) if path.startswith(prefix)), path)
        return tuple(prefix + stem for prefix in _PREFIXES if prefix + stem != path)

    def rows(self, path: str, stream: str, tensor: torch.Tensor, run: Run, apart: bool) -> Rows | None:
        if tensor.ndim != 3:
            raise UnknownRowsError(
                path, run.root, f"it has the shape {list(tensor.shape)}, which is no sequence of tokens"
            )
        return 0, None

    def width(self, module: nn.Module, io: str) -> int | None:
        if hasattr(module, "embed_dim"):  # CLIPEncoderLayer, CLIPAttention
            return module.embed_dim
        if hasattr(module, "fc1") and hasattr(module, "fc2"):  # CLIPMLP
            return getattr(module.fc1, "in_features", None)
        if hasattr(module, "gate_proj"):  # the feed-forward of a language model
            return getattr(module.gate_proj, "in_features", None)
        if hasattr(module, "q_proj"):
            return getattr(module.q_proj, "in_features", None)
        norm = getattr(module, "input_layernorm", None)  # the layer of a language model
        if norm is None:  # T5Block: its norms are over d_model
            norm = next((part for part in module.modules() if hasattr(part, "variance_epsilon")), None)
        if norm is not None:
            return norm.weight.shape[0]
        dense = getattr(getattr(module, "output", None), "dense", None)  # BertLayer
        return getattr(dense, "out_features", None)
