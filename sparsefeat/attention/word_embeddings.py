"""Instruments of words: they look the words of a prompt up, and change the embeddings that the denoiser is given of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from sparsefeat.attention.seen_prompts import SeenPrompts
from sparsefeat.pipeline import Call, Context, FrozenInstrument, UnknownConditionError
from sparsefeat.pipeline.context import HOW_TO_STATE, UNKNOWN


class OfWords(FrozenInstrument):
    """Looks the words of a prompt up among the keys of its attention."""

    condition = "cond"

    def __init__(self, words: Sequence[str]):
        if isinstance(words, str) or not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"words={words!r} must be a list of words of the prompt, as in ['fox', 'rocket'].")
        self.words: tuple[str, ...] = tuple(words)
        self._prompts = SeenPrompts()

    def components(self, pipe: Any) -> tuple[str, ...]:
        return self._prompts.components(pipe)

    def prepare(self, pipe: Any) -> None:
        self._prompts.prepare(pipe)

    def begin_call(self, call: Call) -> None:
        self._call = call
        self._prompts.begin_call(call)

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> Mapping[str, Tensor] | None:
        self._prompts.at_component(name, arguments, context)
        return None

    def tokens(self, image: int, keys: int, denoiser: str) -> list[tuple[int, ...]]:
        root = getattr(self._call.pipe, denoiser)
        return [self._prompts.tokens(image, keys, word, root) for word in self.words]


class WordEmbeddings(OfWords):
    """Changes the text that the denoiser is given, of the conditional rows: `changed` says how."""

    def __init__(self, words: Sequence[str]):
        super().__init__(words)
        self._denoisers: tuple[str, ...] = ()

    def components(self, pipe: Any) -> tuple[str, ...]:
        denoisers = (name for name in ("unet", "transformer", "prior") if getattr(pipe, name, None) is not None)
        self._denoisers = tuple(denoisers)
        return (*self._denoisers, *super().components(pipe))

    def acts(self, context: Context) -> bool:
        """Whether anything is changed now."""
        return True

    def changed(self, embeddings: Tensor, words: Sequence[Sequence[int]], context: Context) -> Tensor:
        """One prompt's embeddings `[tokens, d]` as they are to be, and where the tokens of each word stand in them."""
        raise NotImplementedError

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> Mapping[str, Tensor] | None:
        if name not in self._denoisers:
            return super().at_component(name, arguments, context)
        who = type(self).__name__
        text = arguments.get("encoder_hidden_states")
        if not isinstance(text, Tensor) or text.dim() != 3:
            raise ValueError(f"{name} is given no encoder_hidden_states [batch, tokens, width], which {who} corrects.")
        if UNKNOWN in context.condition:
            raise UnknownConditionError(
                f"which of the {context.batch} batch entries of {name} are conditional cannot be told, and "
                f"{who} corrects these: {HOW_TO_STATE}"
            )
        if not self.acts(context):
            return None
        if len(text) % len(context.condition):
            raise ValueError(
                f"{name} is given {len(text)} texts for {len(context.condition)} batch entries, so that whose they are cannot be "
                f"told; use {who} with one video a prompt."
            )
        after = text.clone()
        entries = after.unflatten(0, (len(context.condition), -1))  # a video may have its text for each frame
        for entry, condition, image in zip(entries, context.condition, context.prompt_index, strict=True):
            if condition == "cond":
                entry.copy_(self.changed(entry[0], self.tokens(image, text.shape[1], name), context))
        return {"encoder_hidden_states": after}
