"""Objects whose settings are settled when they are made."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


class Frozen:
    """Refuses an attribute set after the constructor: what was made of the old value would stay.

    Attributes that begin with an underscore are the object's own state, which goes on changing.

    Raises:
        AttributeError: an attribute is set from outside.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", _then_frozen(cls.__init__))  # noqa: B010 (an assignment would be a type of its own)

    def __setattr__(self, name: str, value: Any) -> None:
        if "_frozen" in vars(self) and not name.startswith("_"):
            kind, settings = type(self).__name__, list(inspect.signature(type(self)).parameters)
            why = "is settled when it is made" if name in settings or hasattr(self, name) else "is no setting of it"
            ours = type(self).__module__.startswith("sparsefeat.")
            raise AttributeError(
                f"{kind}.{name} {why}; make a new one with what you want of {', '.join(settings) or 'it'}"
                + ("" if ours else f", or name what a class of your own changes _{name}")
            )
        super().__setattr__(name, value)


def _then_frozen(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def __init__(self: Frozen, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if type(self).__init__ is __init__:  # not before: a subclass goes on where the one above it ended
            vars(self)["_frozen"] = True

    return __init__
