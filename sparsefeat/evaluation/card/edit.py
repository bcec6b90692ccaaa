"""What stands between a prompt and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefeat.pipeline import Instrument, attach


class LearnedWords:
    """Vectors [n, width] that the text encoder is given in the place of the tokens of n words.

    Args:
        words: of one token each, that no other prompt has.
    """

    def __init__(self, vectors: Tensor, words: Sequence[str]):
        self.vectors: Tensor = vectors
        self.words: tuple[str, ...] = tuple(words)

    @contextmanager
    def put_in(self, pipe: Any) -> Iterator[None]:
        """Within, whatever the pipeline's text encoder reads has them, also what is encoded beside a call."""
        found = [pipe.tokenizer(word, add_special_tokens=False).input_ids for word in self.words]
        if any(len(tokens) != 1 for tokens in found) or len(found) != len(self.vectors):
            raise ValueError(f"words={self.words} must be {len(self.vectors)} words of one token each.")

        def exchange(module: nn.Module, args: tuple, kwargs: dict[str, Any], rows: Tensor) -> Tensor:
            ids = args[0] if args else kwargs["input"]
            for vector, (token,) in zip(self.vectors, found, strict=True):
                rows = torch.where((ids == token)[..., None], vector.to(rows), rows)
            return rows

        hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


@dataclass(frozen=True)
class Edit:
    """Instruments to attach, and words for the negative prompt; of nothing, the pipeline as it is. words: learned ones."""

    instruments: tuple[Instrument, ...] = ()
    negative_prompt: str | None = None
    words: LearnedWords | None = None

    @contextmanager
    def opened(self, pipe: Any) -> Iterator[None]:
        """Within, the pipeline draws so; the negative prompt is the caller's to give."""
        words = self.words.put_in(pipe) if self.words is not None else nullcontext()
        with words, attach(pipe, *self.instruments) if self.instruments else nullcontext():
            yield
