"""Which condition and which prompt each row of a text encoder's batch belongs to: by the token ids that it is given.

A row that holds the ids of a prompt is conditional, one that holds those of a negative prompt is not; of a long prompt
that is encoded in chunks a row holds a part. What words do not settle (a prompt that was rewritten before it was encoded,
the same words for both) the method that encodes does, if it encodes one of the two, or the order: pipelines encode the
prompts first, in one run or one by one, and the negative prompts after.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsefeat.pipeline.context import UNKNOWN, Call
from sparsefeat.pipeline.knowing.conditions import Entries, is_diffusers_own
from sparsefeat.pipeline.knowing.references import Reference, References, listed, rows_of_texts


@dataclass(frozen=True)
class Text:
    condition: str
    prompt: int
    ids: tuple[int, ...]


@dataclass
class TextRows:
    """What is known of the rows of the text encoders in one call."""

    call: Call
    references_of_call: References
    _rows: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # by encoder, the rows it has had

    def entries(self, pipe: Any, component: str, arguments: Mapping[str, Any], batch: int) -> Entries:
        """The entries of one run of a text encoder."""
        rows = self._rows.setdefault(component, [])
        for ids in self._ids(arguments, batch):
            rows.append(self._one(pipe, component, ids, rows))
        conditions, prompts = zip(*rows[-batch:], strict=True) if batch else ((), ())
        return tuple(conditions), tuple(prompt * self.call.images_per_prompt for prompt in prompts)

    @staticmethod
    def _ids(arguments: Mapping[str, Any], batch: int) -> Sequence[list[int] | None]:
        ids = arguments.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.ndim == 2 and len(ids) == batch:
            return ids.tolist()  # one wait for each run of an encoder
        return [None] * batch

    def references(self, pipe: Any, component: str, arguments: Mapping[str, Any], output: Any) -> list[Reference]:
        """What one run of a text encoder made of the texts in it, as far as their ids are those of a prompt or of a
        negative one. Waits for the device once.
        """
        ids = arguments.get("input_ids")
        batch = len(ids) if isinstance(ids, torch.Tensor) and ids.ndim == 2 else 0
        texts = [self._found(pipe, component, row)[0] for row in self._ids(arguments, batch)]
        each = self.call.images_per_prompt
        return [
            Reference(text.condition, text.prompt * each, each, row.detach())
            for rows in map(rows_of_texts, _tensors(output))
            if len(rows) == batch
            for row, fitting in zip(rows, texts, strict=True)
            for text in fitting
            if text.condition != UNKNOWN
        ]

    def _found(self, pipe: Any, component: str, ids: list[int] | None) -> tuple[list[Text], bool, str | None]:
        """The texts that a row of ids is of, whether there are any to compare with, and the condition of all that the
        method encodes in which the encoder runs.
        """
        encoding = self.references_of_call.encodings[0] if self.references_of_call.encodings else None
        only = None if encoding is None or encoding.condition == UNKNOWN else encoding.condition
        texts = [text for text in self._texts(pipe, component) if only in (None, text.condition)]
        found = _fitting(ids, texts, _specials(pipe, component)) if ids is not None else []
        return found, bool(texts), only

    def _one(self, pipe: Any, component: str, ids: list[int] | None, before: list[tuple[str, int]]) -> tuple[str, int]:
        call = self.call
        found, any_texts, only = self._found(pipe, component, ids)
        if len({text.condition for text in found}) == 1:
            (condition, *_) = (text.condition for text in found)
            return condition, min((text.prompt for text in found), key=lambda p: (before.count((condition, p)), p))
        n_prompts = call.n_prompts or 1
        row = len(before)
        if only is not None:
            return only, sum(condition == only for condition, _ in before) % n_prompts
        if any_texts and not found and not (call.own_loop or is_diffusers_own(pipe)):
            return UNKNOWN, row % n_prompts
        given_as_text = call.prompts is not None and call.arguments.get("prompt_embeds") is None
        n_cond = n_prompts if given_as_text or call.own_loop else 0
        return "cond" if row < n_cond else "uncond", row % n_prompts

    def _texts(self, pipe: Any, component: str) -> list[Text]:
        """The prompts and the negative prompts, as ids of this encoder's tokenizer."""
        tokenizer = tokenizer_of(pipe, component)
        if tokenizer is None:
            return []
        said: dict[tuple[str, int, str], None] = {}
        arguments = self.call.arguments
        for name in ("prompt", "prompt_2", "prompt_3", "prompt_4"):
            positive = listed(arguments.get(name)) or (self.call.prompts or [] if name == "prompt" else [])
            said |= {("cond", i, text): None for i, text in enumerate(positive) if isinstance(text, str)}
            # Without a prompt (Marigold) an empty text is nobody's negative one.
            negative = listed(arguments.get(f"negative_{name}")) or ([""] if name == "prompt" and positive else [])
            n_prompts = self.call.n_prompts or 1
            spread = negative * n_prompts if len(negative) == 1 else negative
            said |= {("uncond", i, text): None for i, text in enumerate(spread)}
        for encoding in self.references_of_call.encodings:
            n_cond = "cond" if encoding.condition is None else encoding.condition
            said |= {(n_cond, i, text): None for i, text in enumerate(encoding.prompts)}
            said |= {("uncond", i, text): None for i, text in enumerate(encoding.negatives)}
        return [Text(condition, i, _tokenize(tokenizer, text)) for condition, i, text in said]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what an encoder gave, the hidden states of its layers among them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _fitting(ids: list[int], texts: list[Text], specials: frozenset[int]) -> list[Text]:
    """The texts that a row of ids is of: those that are the same, else those that share the most with it."""
    row = tuple(i for i in ids if i not in specials)
    measured = []
    for text in texts:
        content = tuple(i for i in text.ids if i not in specials)
        if row == content:
            measured.append((True, len(content), text))
        elif row and content:
            match = difflib.SequenceMatcher(None, row, content, autojunk=False).find_longest_match()
            if match.size in (len(content), len(row)):  # the row holds all of the text, or is a part of it
                measured.append((False, match.size, text))
    best = max((fit[:2] for fit in measured), default=None)
    return [text for *fit, text in measured if tuple(fit) == best]


def tokenizer_of(pipe: Any, component: str) -> Any:
    """The tokenizer beside a text encoder: `tokenizer_2` for `text_encoder_2`."""
    suffix = component.partition("text_encoder")[2]
    for name in (
        f"tokenizer{suffix}",
        component.replace("text_encoder", "tokenizer"),
        "tokenizer",
        f"processor{suffix}",
    ):
        part = getattr(pipe, name, None)
        part = getattr(part, "tokenizer", part)
        if callable(part) and hasattr(part, "all_special_ids"):
            return part
    return None


def _specials(pipe: Any, component: str) -> frozenset[int]:
    """What a tokenizer adds by itself; a word that it does not know is none of it, unless that is also its padding."""
    tokenizer = tokenizer_of(pipe, component)
    if tokenizer is None:
        return frozenset()
    adds = {getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "sep")}
    return frozenset(i for i in tokenizer.all_special_ids if i in adds or i != getattr(tokenizer, "unk_token_id", None))


def _tokenize(tokenizer: Any, text: str) -> tuple[int, ...]:
    try:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    except (TypeError, ValueError):
        return ()
