"""Keyword arguments that a pipeline's call does not have.

Many pipelines end their signature in `**kwargs`, for the sake of two arguments of old, and swallow a misspelt one: the
call then runs with the default.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any


def check_arguments(pipe: Any, names: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise TypeError, with the nearest name, if one of `names` is no argument of `pipe(...)`.

    Args:
        also: further names that would be right, the caller's own, to choose the nearest from.
    """
    call = type(pipe).__call__
    parameters = inspect.signature(call).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in names:
        if name in named or (takes_more and name in inspect.unwrap(call).__code__.co_consts):
            continue  # it is in the signature, or the function reads it by name from its **kwargs
        near = difflib.get_close_matches(name, [*named, *also], n=1, cutoff=0.6)
        if takes_more and not near and not type(pipe).__module__.startswith("diffusers."):
            continue  # somebody's own class, which may hand its **kwargs on
        remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(named)}"
        raise TypeError(f"{name}= is no argument of this {type(pipe).__name__}'s call; {remedy}")
