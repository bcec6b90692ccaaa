"""What a prompt became: the ids that the text encoders were given for it, and at which keys of an attention they stand.

A pipeline may rewrite a prompt before it encodes it (weights taken out, a style appended, a word of several vectors
spelled out, a template put around it), pad it on either side, or encode it in chunks. So words are looked up in what was
encoded: the ids are read where the encoders are given them, and the words are told from the ids.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparsefeat.attention.words import NoSuchWordError, Token, count, token_indices, tokens_of
from sparsefeat.pipeline.families.family import TextLayout


@dataclass(frozen=True)
class Rows:
    """What one text encoder was given for one prompt: the ids of each of its runs, padding and all, in order.

    `encoder` is its name in the pipeline, `kept` the attention mask of each run (empty: it was given none), `prompt` its
    own prompt, where the call has one for it (`prompt_2`).
    """

    tokenizer: Any
    ids: tuple[tuple[int, ...], ...]
    encoder: str = ""
    kept: tuple[tuple[bool, ...], ...] = ()
    prompt: str | None = None


@dataclass(frozen=True)
class _Text:
    """What one encoder saw: its tokens, by the keys they stand at, the text that they cover, and the prompt in it.

    `others`: at which of its keys another encoder, of another prompt, has another word.
    """

    tokens: tuple[Token, ...]
    text: str
    prompt: str
    others: frozenset[int] = frozenset()


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt of a call, `rows` of every encoder it went through, and where their tokens stand: as `layout` says, else as
    the number of the keys and the pipeline's class name tell.
    """

    prompt: str
    rows: tuple[Rows, ...]
    pipeline: str = ""
    layout: TextLayout | None = None

    def tokens(self, keys: int) -> tuple[Token, ...]:
        """The tokens, by their positions among `keys` keys.

        Raises ValueError where the encoders were not seen, or what they gave is not what the attention has for keys.
        """
        return tuple(token for text in self._texts(keys) for token in text.tokens)

    def _texts(self, keys: int) -> list[_Text]:
        if self.layout is not None:
            told = self._laid_out(self.layout, keys)
            if told is not None:
                return told
        # One encoder's positions, or those of all one after the other.
        for several in (self.rows[:1], self.rows) if self.layout is None else ():
            places = self._places(several, keys) if several else None
            if places is not None:
                beside = self.rows[len(several) :]  # side by side in the channels
                return [self._text(each, [places.pop(0) for _ in each.ids], beside) for each in several]
        raise ValueError(
            f"at which of the {keys} keys the words of {self.prompt!r} stand cannot be told{self._given()}; name token "
            "positions instead: .map([2, 3])."
        )

    def _given(self) -> str:
        counts = [str(sum(map(len, rows.ids))) for rows in self.rows]
        if not counts:
            return ", as nothing was seen of its encoding"
        return f" from the {', '.join(counts)} tokens that the text encoders were given"

    def _laid_out(self, layout: TextLayout, keys: int) -> list[_Text] | None:
        """The tokens at the keys that the layout gives them; None where there are not as many keys as that."""
        texts, next_key = [], layout.before
        for group in layout.encoders:
            of_group = [rows for name in group for rows in self.rows if rows.encoder == name]
            if not of_group or len(of_group[0].ids) != 1:
                return None
            rows, *beside = of_group
            (ids,) = rows.ids
            kept = rows.kept[0] if layout.packed and rows.kept else (True,) * len(ids)
            places: list[int | None] = []
            for index in range(len(ids)):
                stays = kept[index] and sum(kept[:index]) >= layout.dropped
                places.append(next_key if stays else None)
                next_key += stays
            texts.append(self._text(rows, [places], beside))
        fits = next_key <= keys if layout.more else next_key == keys
        return texts if fits else None

    def _places(self, several: Sequence[Rows], keys: int) -> list[list[int | None]] | None:
        """For each row of ids the key at which each id stands, None where it was left out."""
        rows = [ids for each in several for ids in each.ids]
        total = sum(map(len, rows))
        if total == keys:
            starts = [sum(map(len, rows[:index])) for index in range(len(rows))]
            return [list(range(start, start + len(ids))) for start, ids in zip(starts, rows, strict=True)]
        if len(several) > 1:
            return None
        if len(rows) > 1 and total - 2 * (len(rows) - 1) == keys:  # chunks, without the marks where they meet
            places, next_key = [], 0
            for index, ids in enumerate(rows):
                kept = range(0 if index == 0 else 1, len(ids) - (index < len(rows) - 1))
                places.append([next_key + i - kept.start if i in kept else None for i in range(len(ids))])
                next_key += len(kept)
            return places
        if len(rows) != 1 or total < keys:
            return None
        (ids,) = rows
        if "Sana" in self.pipeline:  # the first token, and the last ones: its instruction is left out
            return [[0, *(None for _ in range(total - keys)), *range(1, keys)]]
        padding = getattr(several[0].tokenizer, "pad_token_id", None)
        if all(token == padding for token in ids[keys:]):
            return [[*range(keys), *(None for _ in range(total - keys))]]
        return None

    def _text(self, rows: Rows, places: list[list[int | None]], beside: Sequence[Rows] = ()) -> _Text:
        tokens: list[Token] = []
        text, prompt = "", self._prompt_of(rows)
        for ids, keys in zip(rows.ids, places, strict=True):
            own, said = _as_written(rows.tokenizer, ids, prompt) if len(rows.ids) == 1 else (None, "")
            if own is None:
                own, said = _read_back(rows.tokenizer, ids)
            begin = len(text) + bool(text)
            text = f"{text} {said}" if text else said
            for token in own:
                key, shift = keys[token.index], 0 if token.special else begin
                if key is not None:
                    tokens.append(replace(token, index=key, start=token.start + shift, stop=token.stop + shift))
        others = {
            key
            for other in beside
            if self._prompt_of(other) != prompt
            for mine, its, keys in zip(rows.ids, other.ids, places, strict=False)
            for token, another, key in zip(mine, its, keys, strict=False)
            if token != another and key is not None and not _is_padding(other.tokenizer, another)
        }
        return _Text(tuple(sorted(tokens, key=lambda token: token.index)), text, prompt, frozenset(others))

    def _prompt_of(self, rows: Rows) -> str:
        return self.prompt if rows.prompt is None else rows.prompt

    def own(self, keys: int) -> list[int]:
        """The keys of the prompt's own tokens, without marks, padding and what a template puts around it."""
        return [key for keys_of_text in self._own(keys) for key in keys_of_text]

    def last(self, keys: int) -> list[int]:
        """The key of the prompt's last own token, one for each encoder whose text stands among the keys; of an empty prompt
        that of the text's first position.
        """
        texts = zip(self._own(keys), self._texts(keys), strict=True)
        return [own[-1] if own else encoded.tokens[0].index for own, encoded in texts]

    def start(self, keys: int) -> list[int]:
        """The key of the mark that the text begins with, of every encoder that has one: CLIP's start token, not T5."""
        texts = zip(self._own(keys), self._texts(keys), strict=True)
        return [encoded.tokens[0].index for own, encoded in texts if own and encoded.tokens[0].special]

    def _own(self, keys: int) -> list[list[int]]:
        found = []
        for encoded in self._texts(keys):
            start, stop = _own_part(encoded) or (0, len(encoded.text))
            found.append([t.index for t in encoded.tokens if not t.special and t.start >= start and t.stop <= stop])
        return found

    def indices(self, keys: int, word: str, occurrence: int | None = None) -> tuple[int, ...]:
        """The keys of a word or phrase; errors as in `token_indices`, and where it may be the template's word."""
        found: list[int] = []
        errors: list[ValueError] = []
        for encoded in self._texts(keys):
            try:
                found += self._indices(encoded, word, occurrence)
            except ValueError as error:  # one encoder may have cut off what another has
                errors.append(error)
        if not found:
            raise min(errors, key=lambda error: isinstance(error, NoSuchWordError))
        if any(encoded.others.intersection(found) for encoded in self._texts(keys)):
            raise ValueError(
                f"word={word!r} shares its place with a word that another text encoder was given (prompt_2=), so there is no "
                f"map of it alone; take that of both, .map({sorted(found)}), or give the encoders one prompt."
            )
        return tuple(found)

    def _indices(self, encoded: _Text, word: str, occurrence: int | None) -> tuple[int, ...]:
        tokens, text = encoded.tokens, encoded.text
        part, asked = _own_part(encoded), count(encoded.prompt, word)
        if part is not None and (asked or not count(text, word)):
            return token_indices(tokens, text, word, occurrence, within=part)
        if asked and count(text, word) != asked:
            raise ValueError(
                f"word={word!r} stands {asked} time(s) in the prompt {encoded.prompt!r} and {count(text, word)} time(s) in what "
                f"{self.pipeline or 'the pipeline'} made of it, {text!r}; name token positions instead: .map([2, 3])."
            )
        return token_indices(tokens, text, word, occurrence)  # of a prompt that was rewritten, or a word put to it


def _own_part(encoded: _Text) -> tuple[int, int] | None:
    """Where the prompt itself stands in what was encoded: the last place where it is written out, or, if its end was
    cut off, as much of it as the text ends with. None if it was rewritten.
    """
    text = encoded.text
    pieces = [re.escape(piece) for piece in re.findall(r"\w+|[^\w\s]", encoded.prompt)]
    for kept in range(len(pieces), 0, -1):
        end = "" if kept == len(pieces) else r"\s*$"
        found = list(re.finditer(r"\s*".join(pieces[:kept]) + end, text, flags=re.IGNORECASE))
        if not found:
            continue
        start, stop = found[-1].span()
        # What is missing was not cut off where it stands before: a word between was not known, and left out.
        rest = [piece for piece in pieces[kept:] if re.search(rf"\b{piece}\b", text[:start], flags=re.IGNORECASE)]
        return None if rest else (start, stop)
    return None


def _as_written(tokenizer: Any, ids: Sequence[int], prompt: str) -> tuple[list[Token] | None, str]:
    """The tokens by the prompt's own characters, where the encoder was given what the tokenizer makes of it."""
    tokens = tokens_of(tokenizer, prompt, len(ids))
    expected = tokenizer.convert_tokens_to_ids([token.text for token in tokens])
    n = len(expected)
    start = next((s for s in range(len(ids) - n + 1) if list(ids[s : s + n]) == expected), None) if n else None
    if start is None or any(not _is_padding(tokenizer, token) for token in (*ids[:start], *ids[start + n :])):
        return None, prompt
    own = [replace(token, index=token.index + start) for token in tokens]
    return own, prompt


def _is_padding(tokenizer: Any, token: int) -> bool:
    return token in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None))


def _read_back(tokenizer: Any, ids: Sequence[int]) -> tuple[list[Token], str]:
    """The tokens by the characters of the text that the ids spell, each by how much it lengthens it; the tokens of a
    character's bytes all by that character.
    """
    special = set(getattr(tokenizer, "all_special_ids", ()))
    names = tokenizer.convert_ids_to_tokens(list(ids))
    tokens: list[Token] = []
    said: list[int] = []
    parts: list[int] = []  # the tokens that end within the bytes of a character
    text, word, vectors = "", "", 1
    for index, (token, name) in enumerate(zip(ids, names, strict=True)):
        if token in special:
            tokens.append(Token(index, name, 0, 0))
            continue
        if said and name == f"{word}_{vectors}":  # a word of several vectors (<cat>, <cat>_1, …) is spelled once
            tokens.append(Token(index, name, tokens[-1].start, tokens[-1].stop))
            vectors += 1
            continue
        word, vectors = name, 1
        said.append(token)
        spelled = tokenizer.decode(said, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        longer = spelled.rstrip("\ufffd")
        if not longer.startswith(text):
            raise ValueError(
                f"what the {type(tokenizer).__name__} spells cannot be followed token by token at {name!r}; name token "
                "positions instead: .map([2, 3])."
            )
        added = longer[len(text) :]
        start = len(text) + len(added) - len(added.lstrip())
        text = longer.rstrip()
        tokens.append(Token(index, name, min(start, len(text)), len(text)))
        if start < len(text):
            for part in parts:
                own = tokens[part]
                tokens[part] = replace(own, start=start if own.special else own.start, stop=start + 1)
            parts = []
        if spelled != longer:
            parts.append(len(tokens) - 1)
    return tokens, text
