"""What the prompts of a call became, seen where the text encoders are given their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparsefeat.attention.encoded import EncodedPrompt, Rows
from sparsefeat.pipeline import Call, Context

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class SeenPrompts:
    """For instruments that look words up: hand on `prepare`, `begin_call` and `at_component`, and listen to `components`."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, Any] = {}
        self._ids: dict[tuple[str, int], list[tuple[int, ...]]] = {}  # by encoder and prompt, of its conditional rows
        self._call: Call | None = None

    def components(self, pipe: Any) -> tuple[str, ...]:
        return tuple(name for name in ENCODERS if getattr(pipe, name, None) is not None)

    def prepare(self, pipe: Any) -> None:
        found = {name: getattr(pipe, name.replace("text_encoder", "tokenizer"), None) for name in ENCODERS}
        self._tokenizers = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    def begin_call(self, call: Call) -> None:
        self._call, self._ids = call, {}

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        ids = arguments.get("input_ids")
        if self._call is None or not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(context.condition):
            return
        for row, condition, image in zip(ids.tolist(), context.condition, context.prompt_index, strict=True):
            if condition == "cond":
                self._ids.setdefault((name, image // self._call.images_per_prompt), []).append(tuple(row))

    def tokens(self, image: int, keys: int, word: str) -> tuple[int, ...]:
        """The positions of a word among the keys of an image's attention; raises ValueError where they cannot be told."""
        call = self._call
        if call is None or call.prompts is None:
            raise ValueError(
                f"where word={word!r} stands cannot be told, as the call was given embeddings, not text; name token "
                "positions instead, as in words=[2, (3, 4)]."
            )
        index = image // call.images_per_prompt
        rows = tuple(
            Rows(self._tokenizers[name], tuple(self._ids[name, index]))
            for name in ENCODERS
            if (name, index) in self._ids and name in self._tokenizers
        )
        return EncodedPrompt(call.prompts[index], rows, type(call.pipe).__name__).indices(keys, word)
