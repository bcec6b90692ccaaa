"""Which condition and which prompt each row of a text encoder's batch belongs to: by the token ids that it is given.

A row that holds the ids of a prompt is conditional, one that holds those of a negative prompt is not; of a long prompt
that is encoded in chunks a row holds a part. A template around the texts has words of its own, which may be those of a text:
once the row of one text is known, that of another is the same row with the other text in its place. What words do not
settle (a prompt that was rewritten before it was encoded, the same words for both) the method that encodes does, if it
encodes one of the two, or the order: pipelines encode the prompts first, in one run or one by one, and the negative prompts
after.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from sparsefeat.pipeline.context import UNKNOWN, Call
from sparsefeat.pipeline.knowing.conditions import Entries, is_diffusers_own
from sparsefeat.pipeline.knowing.references import Reference, References, listed, rows_of_texts

Ids: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Text:
    condition: str
    prompt: int
    ids: Ids


@dataclass
class TextRows:
    """What is known of the rows of the text encoders in one call."""

    call: Call
    references_of_call: References
    _rows: dict[str, list[tuple[str, int]]] = field(default_factory=dict)  # by encoder, the rows it has had
    _written: dict[str, list[tuple[Ids, Ids]]] = field(default_factory=dict)  # of templates: (a row, the text in it)
    _tokenized: dict[tuple[str, str], Ids] = field(default_factory=dict)  # by encoder and text

    def entries(self, pipe: Any, component: str, arguments: Mapping[str, Any], batch: int) -> Entries:
        """The entries of one run of a text encoder."""
        rows = self._rows.setdefault(component, [])
        for ids in self._ids(arguments, batch):
            rows.append(self._one(pipe, component, ids, rows))
            if ids is not None:
                self._learn(pipe, component, ids, rows[-1])
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
        specials = _specials(pipe, component)
        texts = [
            (_content(text.ids, specials), text)
            for text in self._texts(pipe, component)
            if only in (None, text.condition)
        ]
        written = self._written.get(component, [])
        found = _fitting(_content(ids, specials), texts, written) if ids is not None else []
        return found, bool(texts), only

    def _learn(self, pipe: Any, component: str, ids: Sequence[int], entry: tuple[str, int]) -> None:
        """Note how a row of this condition and prompt is written, if there is more in it than the text."""
        specials = _specials(pipe, component)
        row, written = _content(ids, specials), self._written.setdefault(component, [])
        for text in self._texts(pipe, component):
            own = _content(text.ids, specials)
            known = row == own or any(_in_its_place(row, own, *one) for one in written)
            if (text.condition, text.prompt) == entry and own and _places(row, own) and not known:
                written.append((row, own))

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
        for _, _, text in said:
            if (component, text) not in self._tokenized:
                self._tokenized[component, text] = _tokenize(tokenizer, text)
        return [Text(condition, i, self._tokenized[component, text]) for condition, i, text in said]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what an encoder gave, the hidden states of its layers among them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _content(ids: Sequence[int], specials: frozenset[int]) -> Ids:
    return tuple(i for i in ids if i not in specials)


def _fitting(row: Ids, texts: list[tuple[Ids, Text]], written: list[tuple[Ids, Ids]]) -> list[Text]:
    """The texts that a row is of: those that are the same, else those that stand in the place of another in a row that is
    `written`, else those that share the most with it and those that stand apart from these.
    """
    same = [text for ids, text in texts if ids == row]
    same = same or [text for ids, text in texts if any(_in_its_place(row, ids, *one) for one in written)]
    if same:
        return same
    measured = []
    for ids, text in texts:
        if row and ids:
            match = difflib.SequenceMatcher(None, row, ids, autojunk=False).find_longest_match()
            if match.size in (len(ids), len(row)):  # the row holds all of the text, or is a part of it
                measured.append((match.size, ids, text))
    most = max((size for size, *_ in measured), default=0)
    rest = row if most < len(row) else ()
    for size, ids, _ in measured:
        if size == most:
            rest = _without(rest, ids)
    return [text for size, ids, text in measured if size == most or _places(rest, ids)]


def _places(row: Ids, content: Ids) -> list[int]:
    """Where in a row a text stands."""
    return [i for i in range(len(row) - len(content) + 1) if row[i : i + len(content)] == content]


def _without(row: Ids, content: Ids) -> Ids:
    """The row with -1, which is no id, in the place of the text."""
    for place in _places(row, content):
        row = (*row[:place], *(-1 for _ in content), *row[place + len(content) :])
    return row


def _in_its_place(row: Ids, content: Ids, other: Ids, text: Ids) -> bool:
    """Whether a row is the `other` one with `content` where this has `text`."""
    return len(row) - len(content) == len(other) - len(text) and any(
        row == (*other[:place], *content, *other[place + len(text) :]) for place in _places(other, text)
    )


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
