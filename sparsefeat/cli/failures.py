"""What a user reads when something cannot be, could not be done, or was interrupted."""

from __future__ import annotations

import errno
import inspect
import os
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import typer
from typer.models import OptionInfo

from sparsefeat.disk import InUseError
from sparsefeat.whole import Ended

P = ParamSpec("P")
R = TypeVar("R")

# The library's names of what has another name in the shell: the first of these that the command has.
ELSEWHERE = {
    "n_latents": ("--latents",),
    "num_inference_steps": ("--steps",),
    "guidance_scale": ("--guidance",),
    "folder": ("--fitted",),
    "steps": ("--train-steps", "--window"),
}

# What is typed in words, and is no path.
TEXTS = ("prompt", "word", "concept", "into", "find")
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a write, whose error does not say to what


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Errors a user can mend become one sentence and the exit code of `sparsefeat.cli`; bugs keep their traceback."""

    options = options_of(command)

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            read = {name: readable(name, given, options) if name in TEXTS else given for name, given in kwargs.items()}
            with signals_raise(), plain_warnings(options):
                return command(*args, **cast("Any", read))
        except KeyboardInterrupt as error:
            ended = error if isinstance(error, Ended) else Ended()
            typer.echo(f"interrupted; {ended.kept}", err=True)
            raise typer.Exit(128 + ended.number) from None
        except BrokenPipeError:
            raise  # whoever reads the output has enough: `| head`
        except (ValueError, FileNotFoundError, NotADirectoryError, FileExistsError) as error:
            typer.echo(f"error: {in_options(str(error), options)}", err=True)
            raise typer.Exit(2) from None
        except (OSError, MemoryError, RuntimeError, FloatingPointError) as error:
            said = reason(error)
            if said is None:
                raise
            typer.echo(f"error: {in_options(said, options)}", err=True)
            raise typer.Exit(1) from None

    return wrapped


def readable(name: str, given: Any, options: Mapping[str, str]) -> Any:
    """The text, or list of texts, that was typed: its bytes are UTF-8, whatever the locale took them for."""
    if isinstance(given, list):
        return [readable(name, one, options) for one in given]
    try:
        return os.fsencode(given).decode("utf-8") if isinstance(given, str) else given
    except UnicodeError:
        raise ValueError(
            f"{options.get(name, name.upper())} is not text in UTF-8; type it in a terminal of UTF-8"
        ) from None


def reason(error: BaseException) -> str | None:
    """One sentence, also for the errors that say nothing; None for a bug."""
    said = str(error)
    of_torch = isinstance(error, RuntimeError) and re.search("out of memory|can't allocate memory", said)
    if of_torch or (isinstance(error, MemoryError) and not said):
        return "there is not memory enough; take fewer or smaller images at a time, fewer latents, or a smaller model"
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        return f"the output could not be written ({error.strerror}); make room, and run it again"
    if hasattr(error, "missing"):  # HookpointNotReachedError: its result is for those who can catch it
        return said.partition(". Its result")[0]
    return None if isinstance(error, RuntimeError) and not isinstance(error, InUseError) else said


def in_options(sentence: str, options: Mapping[str, str]) -> str:
    """The sentence with the library's arguments as the command's options, `--name`, where it has them: those it spells
    `name=` or with an underscore, and the one it begins with in `name is 3: …`."""

    def spelled(found: re.Match[str]) -> str:
        name, flag, following = found.groups()
        if name not in options:
            return found.group()
        return options[name] if flag or following in ("", *",;:.") else f"{options[name]} "

    sentence = sentence.replace("sparsefeat.hookpoints(pipe)", "`sparsefeat hookpoints`")
    # The one it begins with, and those that are no word of English: `n_latents`.
    plain = r"^\w+(?= is )|(?<![\w.=/'\"-])[a-z]+_\w+(?![\w.=/'\"-])"
    if not re.match(r"\S+: ", sentence):  # "config.json: k is 99" is of a file's, which are its own
        sentence = re.sub(plain, lambda found: options.get(found.group(), found.group()), sentence)
    return re.sub(r"(?<![\w.-])(\w+)=(?!=)(True\b)?(?=(\S?))", spelled, sentence)


def options_of(command: Callable[..., Any]) -> dict[str, str]:
    """The command's options, `--name`, by the names the library has for them."""
    options = {}
    # Not typing.get_type_hints: on Python 3.10 that hides an annotation behind Optional where the default is None.
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        metadata = getattr(parameter.annotation, "__metadata__", ())
        info = next((m for m in metadata if isinstance(m, OptionInfo)), None)
        if info is not None:
            options[name.rstrip("_")] = next(iter(info.param_decls or ()), f"--{name.replace('_', '-')}")
    there = {name: [option for option in known if option in options.values()] for name, known in ELSEWHERE.items()}
    return options | {name: found[0] for name, found in there.items() if found}


@contextmanager
def plain_warnings(options: Mapping[str, str]) -> Iterator[None]:
    """Warnings that are meant for users are a sentence too, without the line of code they come from."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, UserWarning):
                typer.echo(f"warning: {in_options(str(message), options)}", err=True)
            else:
                usual(message, category, *where, **more)

        warnings.showwarning = show
        yield


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGINT raise `Ended` while this is open, where nobody else handles them.

    Of SIGINT too, since Python notes a plain KeyboardInterrupt that passes through code run from C, as in imports of
    libraries, and ends by the signal at last, however it was handled: the exit code would hang on chance.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP", "SIGINT")]  # Windows has no second
        handlers = {number: signal.getsignal(number) for number in known if number is not None}
        before = {n: h for n, h in handlers.items() if h in (signal.SIG_DFL, signal.default_int_handler)}

    def end(number: int, frame: Any) -> None:
        raise Ended(number=number)

    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keeping(sentence: Callable[[], str]) -> Iterator[None]:
    """Says, if the work in here is interrupted, what of it was kept: `sentence()`, which looks."""
    try:
        yield
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Ended) else signal.SIGINT
        raise Ended(str(error), number=number, kept=sentence()) from error
