"""The words that prompts share, which SAEs are measured by. Neither torch nor diffusers is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A word is a concept if so many of the images have it and so many do not.
LEAST_IMAGES = 4
MOST_WORDS = 64
_FUNCTION = (
    "a an and are as at be by for from in into is it its of on or over that the their this to under up was were with"
)
FUNCTION_WORDS = frozenset(_FUNCTION.split())


def shared_words(prompts: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The words of the prompts that enough of them have and lack, the most frequent first; and every prompt's own of them.

    Raises:
        ValueError: fewer than two words are.
    """
    said = [dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower())) for prompt in prompts]
    counts: dict[str, int] = {}
    for of_prompt in said:
        for word in of_prompt:
            counts[word] = counts.get(word, 0) + 1
    n = len(prompts)
    fit = [w for w, c in counts.items() if LEAST_IMAGES <= c <= n - LEAST_IMAGES and w not in FUNCTION_WORDS]
    words = sorted(fit, key=lambda word: (-counts[word], word))[:MOST_WORDS]
    if len(words) < 2:
        raise ValueError(
            f"the {n} prompts have {len(words)} words that {LEAST_IMAGES} of them have and {LEAST_IMAGES} lack: "
            "give more prompts, that share words"
        )
    return words, [[w for w in words if w in of] for of in said]
