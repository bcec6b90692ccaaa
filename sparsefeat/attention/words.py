"""Words of a prompt and the positions of their tokens in the text the pipeline encoded."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


class NoSuchWordError(ValueError):
    """The prompt has no such word, or it was cut off: what is said of that word is that it is not there."""


@dataclass(frozen=True)
class Token:
    """One token of an encoded prompt: its position, and the characters `[start, stop)` of the prompt that it covers.

    A special token (start, end, padding) covers nothing: `start == stop`. `unknown`: what the tokenizer puts in the place
    of a word that it does not have.
    """

    index: int
    text: str
    start: int
    stop: int
    unknown: bool = False

    @property
    def special(self) -> bool:
        return self.start == self.stop


def tokens_of(tokenizer: Any, text: str, length: int | None = None) -> tuple[Token, ...]:
    """The tokens of `text` as the pipeline encodes it, special tokens included, padding not.

    Args:
        tokenizer: a Hugging Face tokenizer. Fast ones report the offsets themselves; for slow ones each token's
            spelling is found in the text from left to right.
        text: the text that was encoded.
        length: number of positions the text encoder saw; tokens past it were cut off and are left out.
            Default: the tokenizer's `model_max_length`.
    """
    limit = length if length is not None else tokenizer.model_max_length
    # Tokenizers without a limit report 10**30 or so; truncation to that overflows in the fast ones.
    truncation: dict[str, Any] = {"truncation": True, "max_length": limit} if limit < 10**6 else {}
    if getattr(tokenizer, "is_fast", False):
        encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, **truncation)
        ids, special, spans = encoded["input_ids"], encoded["special_tokens_mask"], encoded["offset_mapping"]
        names = tokenizer.convert_ids_to_tokens(ids)
        return tuple(
            Token(i, name, 0, 0)
            if is_special
            else Token(i, name, *_trimmed(text, int(start), int(stop)), unknown=name == tokenizer.unk_token)
            for i, (name, is_special, (start, stop)) in enumerate(zip(names, special, spans, strict=True))
        )
    ids = tokenizer(text, **truncation)["input_ids"]
    names = tokenizer.convert_ids_to_tokens(ids)
    return _spelled(names, set(tokenizer.all_special_tokens), text)


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """The span without the white space around it: SentencePiece counts the space before a word as part of it."""
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop


# How the common vocabularies write a word's end (CLIP) or beginning (SentencePiece, byte-level BPE, WordPiece).
_MARKS = re.compile(r"^(▁|Ġ|##)|</w>$")


def _spelled(names: list[str], special: set[str], text: str) -> tuple[Token, ...]:
    """Tokens placed in the text by their spelling; one that cannot be found covers nothing."""
    lowered, cursor, tokens = text.lower(), 0, []
    if len(lowered) != len(text):  # some letters lower to two; then positions would drift
        lowered = text
    for i, name in enumerate(names):
        spelling = _MARKS.sub("", name)
        start = -1 if name in special or not spelling else lowered.find(spelling.lower(), cursor)
        if start < 0:
            tokens.append(Token(i, name, 0, 0))
        else:
            cursor = start + len(spelling)
            tokens.append(Token(i, name, start, cursor))
    return tuple(tokens)


def _ranges(characters: Iterable[int]) -> str:
    """Characters as what stands between the brackets of a pattern."""
    found: list[list[int]] = []
    for character in characters:
        if found and found[-1][1] == character - 1:
            found[-1][1] = character
        else:
            found.append([character, character])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in found)


# Accents and vowel signs that stand after their letter are part of the word, and to `re` they are not. (U+FE00 and on choose
# how a picture looks.)
LETTER = rf"[\w{_ranges(c for c in range(0x300, 0xFE00) if unicodedata.category(chr(c)) in ('Mn', 'Mc'))}]"

# Thai, Lao, Burmese, Khmer, Japanese and Chinese are written without spaces: nothing tells where a word of theirs ends.
UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


def words_of(text: str) -> tuple[str, ...]:
    """The words of a prompt in their order, punctuation left out."""
    return tuple(re.findall(rf"{LETTER}+(?:['’\-]{LETTER}+)*", text))


def token_indices(
    tokens: tuple[Token, ...],
    text: str,
    word: str,
    occurrence: int | None = None,
    within: tuple[int, int] | None = None,
) -> tuple[int, ...]:
    """Positions of the tokens of a word or phrase.

    Args:
        tokens: `tokens_of(tokenizer, text)`.
        text: the text they belong to.
        word: a word or a phrase of consecutive words, in any case; white space in it matches any white space. Of scripts
            that are written without spaces, any part of the text.
        occurrence: which of several occurrences (0 is the first); default all of them together, as in DAAM.
        within: the characters [start, stop) of the text to look in; default all of it.

    Raises:
        NoSuchWordError: the word does not occur as a whole word, or only behind the last token that was encoded.
        ValueError: it is none, or the tokenizer does not have it.

    Example: "a fox and a fox" with CLIP's tokenizer, `word="fox"` -> (2, 5); `occurrence=1` -> (5,).
    """
    parts = word.split() if isinstance(word, str) else []
    if not parts:
        raise ValueError(f"word={word!r} is no word; name a word of the prompt: {', '.join(words_of(text))}.")
    start, stop = within or (0, len(text))
    spans = [match.span() for match in _pattern(parts).finditer(text, start, stop)]
    if not spans:
        words = ", ".join(dict.fromkeys(words_of(text[start:stop])))
        has = f"its words are: {words}" if words else "there is no word in it, only tokens, which .map([0, 1]) shows"
        raise NoSuchWordError(f"word={word!r} is not in the prompt {text[start:stop]!r}; {has}.")
    if occurrence is not None:
        if not hasattr(occurrence, "__index__") or not -len(spans) <= occurrence < len(spans):
            raise NoSuchWordError(
                f"occurrence={occurrence} of word={word!r} does not exist; "
                f"it occurs {len(spans)} time(s) in {text!r}, counted from 0."
            )
        spans = [spans[occurrence]]
    covering = [t for t in tokens if any(t.start < stop and start < t.stop for start, stop in spans)]
    found = [t.index for t in covering if not t.unknown]
    if covering and not found:
        raise ValueError(
            f"word={word!r} is not in the tokenizer's vocabulary (it became {covering[0].text}), so there is no map of it; "
            f"the words of the prompt are: {', '.join(dict.fromkeys(words_of(text)))}."
        )
    if not found:
        raise NoSuchWordError(
            f"word={word!r} stands behind the {len(tokens)} tokens that were encoded of {text!r}; shorten the prompt "
            "or move the word forward."
        )
    return tuple(found)


def count(text: str, word: str) -> int:
    """How often a word or phrase occurs in a text."""
    parts = word.split() if isinstance(word, str) else []
    return len(_pattern(parts).findall(text)) if parts else 0


def _pattern(parts: list[str]) -> re.Pattern[str]:
    """The words of a phrase with white space between them, and perhaps around their punctuation, as some tokenizers
    spell it; no part of a longer word.
    """
    inside = [r"\s*".join(re.escape(piece) for piece in re.findall(rf"{LETTER}+|[^\w\s]", part)) for part in parts]
    first, last = parts[0][0], parts[-1][-1]
    # Of "一只fox" the word is "fox".
    before = rf"(?<!(?!{UNSPACED}){LETTER})" if _ends_a_word(first) else ""
    after = rf"(?!(?!{UNSPACED}){LETTER})" if _ends_a_word(last) else ""
    return re.compile(before + r"\s+".join(inside) + after, flags=re.IGNORECASE)


def _ends_a_word(character: str) -> bool:
    """Whether a letter after it, or before it, would be of the same word."""
    return bool(re.match(rf"(?!{UNSPACED}){LETTER}", character))
