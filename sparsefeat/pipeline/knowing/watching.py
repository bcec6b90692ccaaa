"""Hearing what methods of other people's objects (schedulers, guiders) are called with while a call of a pipeline runs.

The method is replaced on the class that defines it and never on the object, for as long as somebody listens: a copy
that is made in the middle of the call is heard as well, and takes nothing away with it. Calls of other threads, and
those of a pipeline that runs inside another one's call, are not the listener's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

Heard = Callable[[Any, tuple, dict[str, Any], Any], None]
"""(the object, its arguments by position, by name, what the method returned)."""

Asked = Callable[[Any, tuple, dict[str, Any]], tuple[tuple, dict[str, Any]]]
"""(the object, its arguments by position, by name): the arguments to call the method with."""

_lock = threading.RLock()
_listeners: list[Listener] = []
_replaced: dict[tuple[type, str], tuple[Any, Any]] = {}  # what was there, and what is there now


class Listener:
    """Hears the methods named in `methods` of the objects whose classes it was told of, from `open()` to `close()`, and
    is asked before those of them that are named in `before`."""

    def __init__(
        self, methods: Mapping[str, Heard], deaf: Callable[[], bool], before: Mapping[str, Asked] | None = None
    ):
        self.methods = methods
        self.before: Mapping[str, Asked] = before or {}
        self.deaf = deaf
        self.thread = threading.get_ident()
        self._wanted: set[tuple[type, str]] = set()

    def open(self) -> None:
        with _lock:
            _listeners.append(self)

    def listen(self, thing: Any) -> None:
        """Also to what this object is called with, and every other object of its class."""
        owners = {(owner, name) for name in self.methods if (owner := _owner(type(thing), name)) is not None}
        if not owners <= self._wanted:
            with _lock:
                self._wanted |= owners
                _fit()

    def close(self) -> None:
        with _lock:
            if self in _listeners:
                _listeners.remove(self)
            _fit()
            self.methods, self.before = {}, {}  # they hold the listener's owner, and it holds the pipeline


def _owner(kind: type, name: str) -> type | None:
    return next((owner for owner in kind.__mro__ if name in vars(owner)), None)


def _fit() -> None:
    """Make what is replaced what the listeners need. Doing it twice, or after half of it, is harmless."""
    wanted = {key for listener in _listeners for key in listener._wanted}
    for owner, name in [key for key in _replaced if key not in wanted]:
        before, mine = _replaced[owner, name]
        if vars(owner).get(name) is mine:
            setattr(owner, name, before)
        del _replaced[owner, name]
    for owner, name in wanted:
        if (owner, name) not in _replaced:
            before = vars(owner)[name]
            mine = _hearing(owner, name, before)
            _replaced[owner, name] = before, mine
            setattr(owner, name, mine)


def _hearing(owner: type, name: str, original: Any) -> Any:
    @functools.wraps(original)  # pipelines look at the signature of `scheduler.step` to see whether it takes `eta`
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        mine = None
        if _owner(type(self), name) is owner:  # else a class's method called its base class's: one call
            here = threading.get_ident()
            mine = next((one for one in reversed(_listeners) if one.thread == here and name in one.methods), None)
        if mine is None or mine.deaf():
            return original(self, *args, **kwargs)
        if name in mine.before:
            args, kwargs = mine.before[name](self, args, kwargs)
        result = original(self, *args, **kwargs)
        if name in mine.methods and not mine.deaf():
            mine.methods[name](self, args, kwargs, result)
        return result

    return method
