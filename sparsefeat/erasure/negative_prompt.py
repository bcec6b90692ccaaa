"""The simplest erasure, as a baseline: the concept in the negative prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def negative_prompt(concept: str | Sequence[str], **call: Any) -> dict[str, Any]:
    """Arguments for a pipeline's call with the concept put at the end of its negative prompt.

    Args:
        concept: words, or several of them.
        call: the arguments of the call; a negative prompt among them (one, or one for each prompt) is kept.

    Example:
        >>> negative_prompt("fox", prompt="a snowy field", negative_prompt="blurry")
        {'prompt': 'a snowy field', 'negative_prompt': 'blurry, fox'}

    Raises:
        ValueError: guidance_scale is 1 or less, or the call has negative_prompt_embeds; the words would be ignored.
    """
    words = list(concept) if isinstance(concept, Sequence) and not isinstance(concept, str) else [concept]
    if not words or not all(isinstance(word, str) and word.strip() for word in words):
        raise ValueError(f"concept={concept!r} must be a word or a list of words.")
    scale = call.get("guidance_scale")
    if scale is not None and scale <= 1:
        raise ValueError(f"guidance_scale={scale} turns guidance off, and negative prompts with it; use more than 1.")
    if call.get("negative_prompt_embeds") is not None:
        raise ValueError("negative_prompt_embeds cannot take further words; pass negative_prompt as text.")

    def merged(before: str | None) -> str:
        return ", ".join([before, *words] if before else words)

    given = call.get("negative_prompt")
    negative = merged(given) if given is None or isinstance(given, str) else [merged(one) for one in given]
    return {**call, "negative_prompt": negative}
