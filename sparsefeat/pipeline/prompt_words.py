"""Words of a prompt that a pipeline does not know or never reads. Nothing in the image tells; so a warning does."""

from __future__ import annotations

import re
import unicodedata
import warnings
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 6  # words a sentence names; the rest is counted

# A smaller vocabulary was made for a closed set of words, each of them a token: the embedded pipeline's has some three hundred. The
# vocabularies of real text encoders have 20,000 and more, and write rare words in pieces that they know.
CLOSED = 5_000

# A word in pieces of fewer letters than this on average is as good as spelled. Names that T5 knows have 1.75.
LETTERS_A_PIECE = 1.5

_MARKS = re.compile(r"^(▁|Ġ|##)+|</w>$")

_told: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


class PromptWarning(UserWarning):
    """The pipeline reads less of the prompt than it says."""


def warn_of_words(pipe: Any, arguments: Mapping[str, Any], *, stacklevel: int) -> None:
    """Warn, once for each word, of what none of the pipeline's tokenizers knows, and of what all of them cut off.

    `arguments` are those of the call, defaults applied. A word counts as not known if it becomes the tokenizer's token for
    unknown ones, is spelled letter by letter or byte by byte, or, with a closed vocabulary, is not a token of its own.
    """
    texts = dict.fromkeys(text for name in ("prompt", "negative_prompt") for text in _texts(arguments.get(name)))
    tokenizers = _tokenizers(pipe)
    if not texts or not tokenizers:
        return
    told = _told.setdefault(pipe, set())
    words = dict.fromkeys(word for text in texts for word in _words(text) if word not in told)
    unknown = [word for word in words if all(_is_unknown(tokenizer, word) for tokenizer in tokenizers)]
    told.update(unknown)
    name = type(pipe).__name__
    if unknown:
        shown = ", ".join(map(repr, unknown[:SHOWN])) + (f" and {len(unknown) - SHOWN} more" * (len(unknown) > SHOWN))
        warnings.warn(
            f"the tokenizer of this {name} does not know {shown}: it spells them in letters or leaves them out, so the "
            "image need not show them; use words that the pipeline was trained on",
            PromptWarning,
            stacklevel=stacklevel,
        )
    for text in texts:
        parts = [_cut_off(tokenizer, text, arguments) for tokenizer in tokenizers]
        limit, rest = min(parts, key=lambda part: len(part[1]))
        if rest and text not in told:
            told.add(text)
            warnings.warn(
                f"this {name} reads {limit} tokens of a prompt, so {rest[:80]!r}{'…' * (len(rest) > 80)} was cut off; "
                "shorten the prompt",
                PromptWarning,
                stacklevel=stacklevel,
            )


def _texts(given: Any) -> Iterable[str]:
    return [given] if isinstance(given, str) else [text for text in given or () if isinstance(text, str)]


def _tokenizers(pipe: Any) -> list[Any]:
    held = (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2", "tokenizer_3", "tokenizer_4"))
    return [tokenizer for tokenizer in held if hasattr(tokenizer, "tokenize")]


def _words(text: str) -> list[str]:
    """What stands between white space, without the punctuation around it."""

    def outer(character: str) -> bool:
        return unicodedata.category(character)[0] in "PZ"

    words = []
    for word in text.split():
        while word and outer(word[0]):
            word = word[1:]
        while word and outer(word[-1]):
            word = word[:-1]
        words += [word] if word else []
    return words


def _is_unknown(tokenizer: Any, word: str) -> bool:
    if word in tokenizer.all_special_tokens or word in tokenizer.get_added_vocab():
        return False
    tokens = tokenizer.tokenize(word)
    if tokenizer.unk_token is not None and tokenizer.unk_token in tokens:
        return True
    pieces = [token for token in tokens if _MARKS.sub("", token)]
    if len(pieces) < 2:
        return False
    has_case = word.lower() != word.upper()
    if has_case and sum(character.isalpha() for character in word) >= 3:
        return len(tokenizer) < CLOSED or len(word) / len(pieces) < LETTERS_A_PIECE
    # No alphabet with two cases: a piece that is less than a character is some of its bytes.
    return not has_case and not word.isascii() and len(word.encode()) / len(pieces) < 2


def _cut_off(tokenizer: Any, text: str, arguments: Mapping[str, Any]) -> tuple[int, str]:
    """How many tokens are read, and the text behind them."""
    limit = getattr(tokenizer, "model_max_length", None)
    asked = arguments.get("max_sequence_length")
    if isinstance(asked, int) and "CLIP" not in type(tokenizer).__name__:  # CLIP's length is its own in every pipeline
        limit = asked
    if not isinstance(limit, int) or limit > 10**6:  # tokenizers without a limit report 10**30 or so
        return 0, ""
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) <= limit:
        return limit, ""
    kept = max(limit - tokenizer.num_special_tokens_to_add(), 0)
    if not getattr(tokenizer, "is_fast", False):
        return limit, tokenizer.decode(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][kept:])
    own = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    return limit, text[own["offset_mapping"][kept][0] :].strip()
