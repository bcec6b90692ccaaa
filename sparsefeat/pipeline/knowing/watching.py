"""Hearing what methods of other people's objects (schedulers, guiders) are called with while a call of a pipeline runs.

The method is replaced on the class that defines it and not on the object, for as long as somebody listens: a copy that is
made in the middle of the call is heard as well, and takes nothing away with it. Where somebody put a method of their own on
the object, that one is replaced. Calls of other threads, and
those of a pipeline that runs inside another one's call, are not the listener's.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

Heard = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
"""(the object, its arguments by position, by name, what the method returned)."""

Asked = Callable[[Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""(the object, its arguments by position, by name): the arguments to call the method with."""

_Key = tuple[int, str]  # (id of the class, or of an object that has the method itself; the method's name)

_lock = threading.RLock()
_listeners: list[Listener] = []
_replaced: dict[_Key, tuple[Any, Any, Any]] = {}  # the class or object, what was there, and what is there now


class Listener:
    """Hears the methods named in `methods` of the objects whose classes it was told of, from `open()` to `close()`, and
    is asked before those of them that are named in `before`."""

    def __init__(
        self, methods: Mapping[str, Heard], deaf: Callable[[], bool], before: Mapping[str, Asked] | None = None
    ):
        self.methods: Mapping[str, Heard] = methods
        self.before: Mapping[str, Asked] = before or {}
        self.deaf = deaf
        self.thread: int = threading.get_ident()
        self.inside: set[str] = set()
        """The methods that run now: one that calls its base class's, or that of what it wraps, is one call."""
        self._wanted: dict[_Key, Any] = {}

    def open(self) -> None:
        with _lock:
            _listeners.append(self)

    def listen(self, thing: Any) -> None:
        """Also to what this object is called with, and every other object of its class."""
        owners = {(id(owner), name): owner for name in self.methods if (owner := _owner(thing, name)) is not None}
        if not owners.keys() <= self._wanted.keys():
            with _lock:
                self._wanted |= owners
                _fit()

    def close(self) -> None:
        with _lock:
            if self in _listeners:
                _listeners.remove(self)
            _fit()
            self.methods, self.before = {}, {}  # they hold the listener's owner, and it holds the pipeline
            self._wanted = {}


def _owner(thing: Any, name: str) -> Any:
    """Where the method is: the class that defines it, or the object if somebody put one on it."""
    if name in getattr(thing, "__dict__", {}):
        return thing
    return next((owner for owner in type(thing).__mro__ if name in vars(owner)), None)


def _fit() -> None:
    """Make what is replaced what the listeners need. Doing it twice, or after half of it, is harmless."""
    wanted = {key: owner for listener in _listeners for key, owner in listener._wanted.items()}
    for key in [key for key in _replaced if key not in wanted]:
        owner, before, mine = _replaced[key]
        if vars(owner).get(key[1]) is mine:
            setattr(owner, key[1], before)
        del _replaced[key]
    for key, owner in wanted.items():
        if key not in _replaced:
            before = vars(owner)[key[1]]
            mine = (_hearing if isinstance(owner, type) else _hearing_of_one)(owner, key[1], before)
            _replaced[key] = owner, before, mine
            setattr(owner, key[1], mine)


def _hearing(owner: type, name: str, original: Any) -> Any:
    @functools.wraps(original)  # pipelines look at the signature of `scheduler.step` to see whether it takes `eta`
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _heard(self, name, functools.partial(original, self), args, kwargs)

    return method


def _hearing_of_one(thing: Any, name: str, original: Any) -> Any:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return _heard(thing, name, original, args, kwargs)

    return method


def _heard(thing: Any, name: str, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    here = threading.get_ident()
    mine = next((one for one in reversed(_listeners) if one.thread == here and name in one.methods), None)
    if mine is None or mine.deaf() or name in mine.inside:
        return original(*args, **kwargs)
    try:
        mine.inside.add(name)
        if name in mine.before:
            args, kwargs = mine.before[name](thing, args, kwargs)
        result = original(*args, **kwargs)
    finally:
        mine.inside.discard(name)
    if name in mine.methods and not mine.deaf():
        mine.methods[name](thing, args, kwargs, result)
    return result
