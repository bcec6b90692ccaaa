"""What `HeatMaps` is asked for, by the names of its arguments: each function raises ValueError with the name and the remedy."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from sparsefeat.arguments import number, whole

KEPT = ("layers", "heads", "steps")


def names_of(name: str, given: str | Sequence[str] | None, example: str) -> tuple[str, ...] | None:
    """One name or several, none of them blank; None stays so. example: what to write, for the refusal."""
    if given is None:
        return None
    names = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else ()
    if not names or not all(isinstance(one, str) and one.strip() for one in names):
        what = "a module path or a list of them" if name == "layers" else "a word or a list of them"
        raise ValueError(f"{name}={given!r} must be {what}, as in {example}.")
    return names


def words_of(given: Sequence[str | int] | None) -> tuple[str | int, ...] | None:
    """Positions of tokens, then words; None stays so."""
    if given is None or isinstance(given, str) or not isinstance(given, Sequence):
        return names_of("words", given, "words=['fox']")
    places = tuple(whole(f"words[{i}]", word, 0) for i, word in enumerate(given) if not isinstance(word, str))
    named = [word for word in given if isinstance(word, str)]
    return (*places, *(names_of("words", named, "words=['fox']") or ())) if named or not places else places


def kept_of(keep: Sequence[str]) -> tuple[str, ...]:
    """Some of `KEPT`; heads only with layers."""
    if isinstance(keep, str) or not isinstance(keep, Collection) or not all(what in KEPT for what in keep):
        raise ValueError(f"keep={keep!r} must be a list of {', '.join(map(repr, KEPT))}.")
    if "heads" in keep and "layers" not in keep:
        raise ValueError(f"keep={list(keep)!r} keeps heads of different layers in one map; keep 'layers' too.")
    return tuple(keep)


def weights_of(path: str, given: float | Sequence[float]) -> tuple[float, ...]:
    """A layer's factor, or one for each of its heads; none below 0."""
    numbers = given if isinstance(given, (Sequence, Tensor)) else [given]
    return tuple(number(f"layer_weights[{path!r}]", weight, 0) for weight in numbers)
