"""Everything that is changed in a pipeline while sessions are attached to it, in one place, with its undoing.

One `Wiring` serves all sessions of a pipeline. It holds what they need together and nothing more: a hook on each module
with a hookpoint, a wrapper around `forward` of each tapped attention module, a hook on the components these lie in, changed
weights, and a class for the pipeline object. What only a running call needs is put in when the call begins and taken out when it
ends. What is to be put in is noted before it is, and taken out by looking for it, so whatever an interrupt left half
done is finished by the next attempt. Modules know their wiring weakly: where the pipeline and its sessions are
forgotten, the hooks go too.

**How the beginning and the end of a call are noticed.** Python looks `__call__` up on the type, so it cannot be
wrapped on the instance. While sessions are attached the object's class is a subclass of its own, of the same name, that
overrides `__call__` and the methods that encode prompts and pick timesteps, and nothing else; `isinstance` holds, and `save_pretrained` and `from_pipe` go by the class's
name. A copy of the pipeline is of the class that was there. The alternative, wrapping methods that pipelines happen to call (`check_inputs` first, `maybe_free_model_hooks`
last), needs each of 150 pipelines to call both, and tells an exception from a long call only at the next one.
"""

from __future__ import annotations

import copyreg
import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from sparsefeat.arguments import on_the_cpu_by_default
from sparsefeat.pipeline.attention_seam import AttentionTap
from sparsefeat.pipeline.call_arguments import check_arguments, check_values
from sparsefeat.pipeline.compiled import hooks_guarded
from sparsefeat.pipeline.context import Call
from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.hooks import Hook, HookKey
from sparsefeat.pipeline.instrument import AttentionCall, Enough
from sparsefeat.pipeline.knowing.references import ENCODERS
from sparsefeat.pipeline.outcome import Missing, missing, report, warn_of_silence, warn_of_unkept
from sparsefeat.pipeline.prompt_words import warn_of_words
from sparsefeat.pipeline.running import Guard, RunningCall, calls_here
from sparsefeat.pipeline.visits import Place, Tap, Visits, in_backward
from sparsefeat.pipeline.weights import WeightPlace, put_on, take_off

if TYPE_CHECKING:
    from sparsefeat.pipeline.attachment import Attachment


class Wiring:
    def __init__(self, pipe: Any):
        self._pipe = weakref.ref(pipe)
        self._class = type(pipe)
        self._thread = threading.get_ident()
        self.attachments: list[Attachment] = []
        self._hooks: dict[HookKey, Hook] = {}
        self._taps: dict[int, AttentionTap] = {}
        self._weights: dict[WeightPlace, bool] = {}  # whether it is in: noted before it is
        self._running: RunningCall | None = None
        self._guard = Guard()
        self._visits = Visits(self._guard)
        weakref.finalize(self, _take_off, self._hooks, self._taps, self._weights).atexit = False

    @staticmethod
    def of(pipe: Any) -> Wiring:
        """The wiring that is in the pipeline, or a new one that is not yet."""
        wiring = getattr(type(pipe), "_sparsefeat_wiring", None)
        return wiring if wiring is not None and wiring._pipe() is pipe else Wiring(pipe)

    # Putting in and taking out

    def add(self, attachment: Attachment) -> None:
        self.check_thread()
        self.attachments.append(attachment)
        self._fit()

    def remove(self, attachment: Attachment) -> None:
        if attachment in self.attachments:
            self.attachments.remove(attachment)
        if not self.attachments and self._running is not None:
            running, self._running = self._running, None
            running.close()
        self._fit()

    def _fit(self) -> None:
        """Make what is in the pipeline what the sessions need. Doing it twice, or after half of it, is harmless."""
        wanted: dict[HookKey, Target] = {}
        tapped: dict[int, Target] = {}
        unturned: set[int] = set()
        for attachment in self.attachments:
            parts: list[Place | Tap | WeightPlace] = [
                *attachment.places,
                *attachment.taps,
                *attachment.listened,
                *attachment.weights,
            ]
            for target in [part.target for part in parts]:
                root = replace(target, path=target.root_name, module=target.root)
                wanted.setdefault((id(root.module), "root"), root)
            for place in attachment.places:
                wanted.setdefault(place.hook, place.target)
            for target in attachment.between:
                wanted.setdefault((id(target.module), "between"), target)
            for tap in attachment.taps:
                tapped.setdefault(id(tap.target.module), tap.target)
                if tap.instrument.reads_unturned:
                    unturned.add(id(tap.target.module))
        changes = [change for attachment in self.attachments for change in attachment.weights]
        gone = [change for change in self._weights if change not in changes]
        take_off(gone)
        for change in gone:
            del self._weights[change]
        for key in [key for key in self._hooks if key not in wanted]:
            self._hooks[key].take_off()
            del self._hooks[key]
        for module in [module for module in self._taps if module not in tapped]:
            self._taps[module].take_off()
            del self._taps[module]
        for module, target in tapped.items():
            if module not in self._taps:
                self._taps[module] = AttentionTap(self, target)
                self._taps[module].put_on()
            self._taps[module].unturned = module in unturned
        for key, target in wanted.items():
            if key not in self._hooks:
                self._hooks[key] = Hook(self, key[1], target)
            self._hooks[key].put_on()
        for change in changes:
            if not self._weights.setdefault(change, False):
                put_on(change)
                self._weights[change] = True
        self._set_class()

    def _set_class(self) -> None:
        pipe = self._pipe()
        if pipe is None:
            return
        attached = type(pipe) is not self._class and vars(type(pipe)).get("_sparsefeat_wiring") is self
        if self.attachments and not attached:
            object.__setattr__(pipe, "__class__", self._subclass())
        elif not self.attachments and attached:
            object.__setattr__(pipe, "__class__", self._class)

    def _subclass(self) -> type:
        names = {name: getattr(self._class, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace = {
            **names,
            "__call__": self._called(self._class.__call__),
            "__reduce_ex__": _reduced(self._class),
            "_sparsefeat_wiring": self,
        }
        for name in dir(self._class):
            method = inspect.getattr_static(self._class, name)
            if isinstance(method, types.FunctionType):
                if ENCODERS.fullmatch(name):
                    namespace[name] = self._encoding(method)
                elif name == "get_timesteps":
                    namespace[name] = self._taking(method)
        return types.new_class(self._class.__name__, (self._class,), exec_body=lambda body: body.update(namespace))

    def _called(self, original: Callable[..., Any]) -> Callable[..., Any]:
        wiring = self

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if wiring._at_work() or not wiring.attachments or wiring._pipe() is not self:
                return original(self, *args, **kwargs)
            check_arguments(self, kwargs)
            try:
                bound = inspect.signature(original).bind(self, *args, **kwargs)
            except TypeError:
                return original(self, *args, **kwargs)  # wrong arguments: the pipeline's own error names them
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            for name, parameter in bound.signature.parameters.items():
                if parameter.kind is parameter.VAR_KEYWORD:  # what it passes on is an argument like others
                    arguments = {**arguments.pop(name), **arguments}
            check_values(self, arguments)
            warn_of_words(self, arguments, stacklevel=3)
            warn_of_unkept(wiring.attachments)
            with wiring.calling(Call.of(self, arguments)) as running:
                try:
                    running.result = original(self, *args, **kwargs)
                except Enough:
                    running.is_cut_short = True
                    # What diffusers' pipelines end with: models that are offloaded leave the device.
                    getattr(self, "maybe_free_model_hooks", lambda: None)()
            return running.result

        return call

    def _encoding(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A method that turns texts or images into embeddings, with what it returns noted."""
        wiring = self

        @functools.wraps(original)
        def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
            running = wiring._running
            if running is None or wiring._guard.up or wiring._pipe() is not self:
                return original(self, *args, **kwargs)
            running.references.begin(original, self, args, kwargs)
            result = None
            try:
                result = original(self, *args, **kwargs)
            finally:
                running.references.end(original, self, result)
            return result

        return encode

    def _taking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`get_timesteps`, with the timesteps that it picked noted."""
        wiring = self

        @functools.wraps(original)
        def get_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            running = wiring._running
            if running is not None and not wiring._guard.up and wiring._pipe() is self:
                running.steps.takes(result[0] if isinstance(result, tuple) else result)
            return result

        return get_timesteps

    def check_thread(self) -> None:
        if threading.get_ident() != self._thread:
            raise RuntimeError(
                f"this {self._class.__name__} has a session attached in another thread (ident {self._thread}), and "
                "hooks cannot tell the calls of two threads apart: close the session first, or give each thread a "
                "pipeline of its own"
            )

    # One call

    @contextmanager
    def calling(self, call: Call) -> Iterator[RunningCall]:
        """One call of the pipeline: from `begin_call` to `end_call` and the check that every hookpoint was reached."""
        self.check_thread()
        on_the_cpu_by_default()
        if self._running is not None and self._running.over:
            self._running.close()
        elif self._running is not None:
            raise RuntimeError(
                f"this {self._class.__name__} was called again before its call had ended (from a callback?); call "
                "it inside an instrument's own method, where it is not hooked, or use a second pipeline"
            )
        self._guard.up = False
        for attachment in self.attachments:
            attachment.find_wrapped()
        self._fit()  # caches that were turned on since
        running = RunningCall(self._pipe(), call, tuple(self.attachments), self._guard, self._fit)
        running.refuse_what_is_at_work()
        for attachment in self.attachments:
            attachment.prepare_again()
        try:
            self._running = running
            self._visits.forget()
            running.open()
            with hooks_guarded():
                yield running
            running.close()
            unreached = {attachment: missing(attachment, running) for attachment in running.attachments}
            for attachment in running.attachments:
                self._end_call(attachment, running, unreached[attachment])
        finally:
            running.over = True
            running.close()
            self._running = None  # not before: what an interrupt leaves open here, closing the session closes
            call.forget_objects()
        if running.is_cut_short:
            return
        for attachment in running.attachments:
            warn_of_silence(attachment, running)
        report(unreached, running.result)

    def _end_call(self, attachment: Attachment, running: RunningCall, unreached: list[Missing]) -> None:
        """Recordings of the instruments that had all their hookpoints; the others have nothing to record."""
        without = {id(what.instrument) for what in unreached}
        values = {}
        for instrument in attachment.instruments:
            if id(instrument) not in without:
                with self._guard.raised():
                    values[id(instrument)] = instrument.end_call(running.call)
        attachment.record(running.call, values)

    def _at_work(self) -> bool:
        """Whether an instrument is: what an interrupt left of an earlier call is no sign of it."""
        return self._guard.up and self._running is not None and not self._running.over

    # What the hooks do

    def listening(self) -> bool:
        here = calls_here()
        another = bool(here) and here[-1] is not self._running  # of a pipeline that shares the module
        return bool(self.attachments) and not self._guard.up and not another and not in_backward()

    def heard(self, kind: str, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A hooked module is about to run, or has run."""
        if self._guard.up or not self.attachments:
            return None
        if kind == "between":
            running = self._running
            if running is not None and calls_here()[-1:] == [running] and not in_backward():
                running.passed_through(target, args, kwargs, output)
            return None
        if in_backward():
            if kind == "root":
                return None
            running = self._running
        else:
            running = self._current(target)
            if running is None:
                return None
        if kind == "root":
            assert running is not None
            return running.begin_root(target, args, kwargs)
        if kind == "before":
            return self._visits.before(running, target, args, kwargs)
        return self._visits.after(running, target, args, kwargs, output)

    def attended(self, target: Target, call: AttentionCall) -> None:
        running = self._current(target)
        if running is not None:
            self._visits.attention(running, target, call)

    def _current(self, target: Target) -> RunningCall | None:
        """The call that the module runs in; None if it is another pipeline's, which shares the module."""
        here = calls_here()
        if here and here[-1] is not self._running:
            return None
        self.check_thread()
        if self._running is None or self._running.over:
            if self._was_called_before():
                raise RuntimeError(
                    f"this {self._class.__name__} was in a call already when it was attached to (in a callback?); attach "
                    "first and call then"
                )
            raise RuntimeError(
                f"{target.path} ran outside a call of this {self._class.__name__} while a session is attached to it, so "
                "what step and which prompt it is cannot be told: write `with session.call(prompts=[...]):` around a "
                "loop of your own; if another pipeline that shares the model ran it, attach to that one too or close "
                "this session first (sparsefeat.detach(pipe) closes all)"
            )
        return self._running

    def _was_called_before(self) -> bool:
        """Whether what runs is a call of the pipeline that began before it was attached to."""
        pipe, frame = self._pipe(), sys._getframe()
        while frame is not None:
            if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _take_off(hooks: dict[HookKey, Hook], taps: dict[int, AttentionTap], weights: dict[WeightPlace, bool]) -> None:
    take_off(list(weights))
    for hook in hooks.values():
        hook.take_off()
    for tap in taps.values():
        tap.take_off()


def _reduced(original: type) -> Callable[..., Any]:
    """How a copy of the pipeline is made (deepcopy, pickle): of the class that was there before."""

    def reduce(self: Any, protocol: Any) -> Any:
        reduced: Any = original.__reduce_ex__
        how, arguments, *rest = reduced(self, protocol)
        if how is copyreg.__newobj__:  # type: ignore[attr-defined]  # which pickle takes of an object's own class alone
            how = original.__new__
        return (how, tuple(original if argument is type(self) else argument for argument in arguments), *rest)

    return reduce
