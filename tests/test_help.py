"""`help` of everything public says what it refuses: a section Raises names every kind of error that its code raises."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import sparsefeat
import sparsefeat.attention
import sparsefeat.features
import sparsefeat.pipeline
from sparsefeat import presets

# The packages after the first have what a session gives; the published systems are gone through besides.
MODULES = (sparsefeat, sparsefeat.attention, sparsefeat.features, sparsefeat.pipeline)

# What a user never calls: a session, `save` and `load_instrument` do, and say themselves what they refuse.
INTERNAL = {name for name in vars(sparsefeat.Instrument) if not name.startswith("__")} | {
    "change", "changed", "find_wrapped", "from_saved", "to_saved",
}  # fmt: skip

# Errors that cannot reach the caller, though the code beneath raises them: of several trainers, of what is caught again.
NEVER_SEEN = {"SAETrainer.fit": {"ValueError"}, "load_instrument": {"KeyError"}}


def behind(member: Any) -> FunctionType | None:
    """The function of ours that a method, a property or a decorated function is."""
    for inner in ("__func__", "fget", "func"):
        member = getattr(member, inner, member)
    member = inspect.unwrap(member) if callable(member) else member
    ours = isinstance(member, FunctionType) and member.__module__.split(".")[0] == "sparsefeat"
    return member if ours and member.__code__.co_filename != "<string>" else None  # which dataclasses write


def raised(function: FunctionType, owner: type | None, deeper: bool = True) -> Iterator[type[BaseException]]:
    """By the function's own lines, and by those of the functions that it calls by name."""
    there = vars(builtins) | function.__globals__
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            named = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            kind = there.get(named.id) if isinstance(named, ast.Name) else None
            if isinstance(kind, type):
                yield kind
        elif deeper and isinstance(node, ast.Call):
            called = None
            if isinstance(node.func, ast.Name):
                called = behind(there.get(node.func.id))
            elif isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("self", "cls"):
                called = behind(inspect.getattr_static(owner, node.func.attr, None))
            if called is not None:
                yield from raised(called, owner, deeper=False)


def public() -> Iterator[tuple[str, Any]]:
    for module in MODULES:
        yield from ((name, getattr(module, name)) for name in module.__all__)
    for name in presets.__all__:
        system = getattr(presets, name)
        its = {inner: value for inner, value in vars(system).items() if not inner.startswith("_")}
        yield from ((f"{name}.{n}", v) for n, v in its.items() if getattr(v, "__module__", "") == system.__name__)


def documented() -> Iterator[tuple[str, str, FunctionType, type | None]]:
    """(name, docstring, function, class) of every public function, constructor and method of a public class."""
    for name, value in public():
        if not isinstance(value, type):
            if (function := behind(value)) is not None:
                yield name, inspect.getdoc(value) or "", function, None
            continue
        for maker in ("__init__", "__post_init__"):
            if (function := behind(inspect.getattr_static(value, maker, None))) is not None:
                yield name, f"{value.__doc__}\n{function.__doc__}", function, value
        for inner in dir(value):
            function = behind(inspect.getattr_static(value, inner))
            if function is not None and not inner.startswith("_") and inner not in INTERNAL:
                yield f"{name}.{inner}", inspect.getdoc(getattr(value, inner)) or "", function, value


def lacks(said: str, kinds: set[type[BaseException]]) -> set[str]:
    """The kinds that the docstring does not name, by themselves or by what they are a kind of, nor leaves to another's."""
    section = re.split(r"\bRaises\b", said, maxsplit=1)[1:]
    if section and re.search(r"\bas `|\bas the class", section[0]):
        return set()
    named = set(re.findall(r"\b\w+(?:Error|Exception)\b", "".join(section)))
    return {kind.__name__ for kind in kinds if not named & {base.__name__ for base in kind.__mro__[:-3]}}


def test_help_names_every_kind_of_error():
    missing, n = {}, 0
    for name, said, function, owner in documented():
        kinds = set(raised(function, owner))
        n += bool(kinds)
        if left := lacks(said, kinds) - NEVER_SEEN.get(name, set()):
            missing[name] = left
    assert missing == {}
    assert n > 150  # of the public names can refuse


def test_an_error_that_is_not_named_is_found():
    record = sparsefeat.Record
    kinds = set(raised(behind(record.__init__), record))
    assert kinds == {TypeError, ValueError}  # by its own lines, by `whole` and by `hookpoint_of`
    assert lacks("Keeps codes.", kinds) == {"TypeError", "ValueError"}
    assert lacks("Keeps codes.\n\nRaises:\n    ValueError: no hookpoint.", kinds) == {"TypeError"}
    assert lacks("Raises:\n    OSError: the disk is full.", {FileExistsError}) == set()
