"""Everything that is changed in a pipeline while sessions are attached to it, in one place, with its undoing.

One `Wiring` serves all sessions of a pipeline. It holds what they need together and nothing more: a torch hook on each
module with a hookpoint, a wrapper around `forward` of each tapped attention module, a hook on the components these
lie in, and a class for the pipeline object. What only a running call needs (the scheduler's wrapper) is put in when
the call begins and taken out when it ends. Nothing depends on an epilogue of the pipeline or of a hook, so an
exception or an interrupt at any moment leaves nothing behind.

**How the beginning and the end of a call are noticed.** Python looks `__call__` up on the type, so it cannot be
wrapped on the instance. While sessions are attached the object's class is a subclass of its own, of the same name, that
overrides `__call__` and nothing else; `isinstance` holds, and `save_pretrained` and `from_pipe` go by the class's
name. The alternative, wrapping methods that pipelines happen to call (`check_inputs` first, `maybe_free_model_hooks`
last), needs each of 150 pipelines to call both, and tells an exception from a long call only at the next one.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsefeat.pipeline.attention_seam import AttentionTap
from sparsefeat.pipeline.call_arguments import check_arguments, check_values
from sparsefeat.pipeline.compiled import hooks_guarded
from sparsefeat.pipeline.conditions import Entries, denoiser_entries, outside_entries, spread, text_entries
from sparsefeat.pipeline.context import Call, Context
from sparsefeat.pipeline.families.family import Run, timestep_in
from sparsefeat.pipeline.hookpoints import Hookpoint, Target
from sparsefeat.pipeline.instrument import (
    Activations,
    AttentionCall,
    Delta,
    Instrument,
    Replace,
    like_tensor,
)
from sparsefeat.pipeline.outputs import argument, put, put_argument, take, take_argument
from sparsefeat.pipeline.part import Part
from sparsefeat.pipeline.prompt_words import warn_of_words
from sparsefeat.pipeline.schedule import Schedule

if TYPE_CHECKING:
    from sparsefeat.pipeline.session import Session

# The autograd engine runs backward passes in threads of its own; -1 is "not in a backward pass".
_backward_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

HookKey = tuple[int, str]  # (id of the module, "before", "after" or "root")
Seen = dict[tuple[str, Part], "Activations"]  # by io and part: what instruments at one hook share


@dataclass(frozen=True, eq=False)
class Place:
    """One instrument at one hookpoint."""

    instrument: Instrument
    hookpoint: Hookpoint
    target: Target
    stream: str
    """The stream that is meant here: the hookpoint's own where the model has several."""

    @property
    def hook(self) -> HookKey:
        """The torch hook that serves it: the module, and before or after its forward."""
        return id(self.target.module), "before" if self.hookpoint.io == "input" else "after"


@dataclass(frozen=True, eq=False)
class Tap:
    """One instrument at one attention module, or listening to one component."""

    instrument: Instrument
    target: Target


@dataclass(eq=False)
class RootRun:
    """One run of a component: its arguments, from which the grid is known, and the rows of its batch."""

    target: Target
    run: Run
    entries: Entries
    scheduled: int = 0
    """How many scheduler steps came before it."""
    earlier: tuple[int, ...] = ()
    """The batch sizes of the runs before it in the same step."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.run.arguments


@dataclass(frozen=True, eq=False)
class Edit:
    """One instrument's edit of one run of a module: what is needed to do it again."""

    place: Place
    context: Context
    run: RootRun


@dataclass(eq=False)
class RunningCall:
    """The state of the call that is going on."""

    call: Call
    schedule: Schedule
    sessions: tuple[Session, ...]
    result: Any = None
    roots: dict[str, RootRun] = field(default_factory=dict)
    texts_seen: dict[str, int] = field(default_factory=dict)
    reached: set[HookKey] = field(default_factory=set)
    tapped: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Missing:
    """A hookpoint or an attention that a completed call did not reach: whose, and why with the remedy."""

    instrument: Instrument
    name: str
    why: str


class HookpointNotReachedError(RuntimeError):
    """A call of the pipeline completed without ever running a hooked module. `result` is what the call returned."""

    def __init__(self, message: str, missing: tuple[str, ...], result: Any):
        super().__init__(message)
        self.missing = missing
        self.result = result


class Wiring:
    def __init__(self, pipe: Any):
        self._pipe = weakref.ref(pipe)
        self._class = type(pipe)
        self._thread = threading.get_ident()
        self.sessions: list[Session] = []
        self._handles: dict[HookKey, Any] = {}
        self._taps: dict[int, AttentionTap] = {}
        self._running: RunningCall | None = None
        self._in_instrument = False
        # What checkpointed modules need to run again in a backward pass: the last run's context comes first there.
        self._replays: dict[HookKey, list[list[Edit]]] = {}

    @staticmethod
    def of(pipe: Any) -> Wiring:
        """The wiring that is in the pipeline, or a new one that is not yet."""
        wiring = getattr(type(pipe), "_sparsefeat_wiring", None)
        return wiring if wiring is not None and wiring._pipe() is pipe else Wiring(pipe)  # not that of a copy

    # Putting in and taking out

    def add(self, session: Session) -> None:
        self.check_thread()
        try:
            self.sessions.append(session)
            self._fit()
        except BaseException:
            self.remove(session)
            raise

    def remove(self, session: Session) -> None:
        if session in self.sessions:
            self.sessions.remove(session)
        self._fit()

    def _fit(self) -> None:
        """Make what is in the pipeline what the sessions need. Doing it twice, or after half of it, is harmless."""
        wanted: dict[HookKey, tuple[Target, Callable[..., Any]]] = {}
        tapped: dict[int, Target] = {}
        for session in self.sessions:
            taps = [part.target for part in (*session.taps, *session.listened)]
            for target in [part.target for part in session.places] + taps:
                root = replace(target, path=target.root_name, module=target.root)
                wanted.setdefault((id(root.module), "root"), (root, self._root_hook))
            for place in session.places:
                wanted.setdefault(place.hook, (place.target, getattr(self, f"_{place.hook[1]}_hook")))
            for tap in session.taps:
                tapped.setdefault(id(tap.target.module), tap.target)
        for key in [key for key in self._handles if key not in wanted]:
            self._handles.pop(key).remove()
        for module in [module for module in self._taps if module not in tapped]:
            self._taps.pop(module).remove()
        for module, target in tapped.items():
            if module not in self._taps:
                seen = functools.partial(self._attention, target)
                self._taps[module] = AttentionTap(target.path, target.module, self._listening, seen)
        for key, (target, make) in wanted.items():
            if key not in self._handles:
                self._handles[key] = self._register(key[1], target, make(target))
        self._set_class()

    @staticmethod
    def _register(kind: str, target: Target, hook: Callable[..., Any]) -> Any:
        hook = torch.compiler.disable(hook)  # instruments run between the graphs of a compiled model, not in them
        if kind == "after":
            # First of the module's hooks: transformers collects `hidden_states` with one, which has to see the edit.
            return target.module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        return target.module.register_forward_pre_hook(hook, with_kwargs=True, prepend=kind == "root")

    def _set_class(self) -> None:
        pipe = self._pipe()
        if pipe is None:
            return
        attached = type(pipe) is not self._class and vars(type(pipe)).get("_sparsefeat_wiring") is self
        if self.sessions and not attached:
            object.__setattr__(pipe, "__class__", self._subclass())
        elif not self.sessions and attached:
            object.__setattr__(pipe, "__class__", self._class)

    def _subclass(self) -> type:
        original = self._class.__call__
        wiring = self

        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if wiring._in_instrument or not wiring.sessions or wiring._pipe() is not self:
                return original(self, *args, **kwargs)
            check_arguments(self, kwargs)
            try:
                bound = inspect.signature(original).bind(self, *args, **kwargs)
            except TypeError:
                return original(self, *args, **kwargs)  # wrong arguments: the pipeline's own error names them
            bound.apply_defaults()
            arguments = dict(list(bound.arguments.items())[1:])
            check_values(self, arguments)
            warn_of_words(self, arguments, stacklevel=3)
            with wiring.calling(Call.of(self, arguments)) as running:
                running.result = original(self, *args, **kwargs)
            return running.result

        names = {name: getattr(self._class, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace = {**names, "__call__": call, "_sparsefeat_wiring": self}
        return types.new_class(self._class.__name__, (self._class,), exec_body=lambda body: body.update(namespace))

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
        if self._running is not None:
            raise RuntimeError(
                f"this {self._class.__name__} was called again before its call had ended (from a callback?); call "
                "it inside an instrument's own method, where it is not hooked, or use a second pipeline"
            )
        pipe = self._pipe()
        schedule = Schedule(pipe, self._step_completed, own_loop=call.own_loop)
        running = RunningCall(call, schedule, tuple(self.sessions))
        try:
            self._running = running
            self._replays.clear()
            schedule.open()
            for session in running.sessions:
                for instrument in session.instruments:
                    with self._inside_instrument():
                        instrument.begin_call(call)
            with hooks_guarded():
                yield running
            schedule.close()
            missing = {session: self._missing(session, running) for session in running.sessions}
            for session in running.sessions:
                self._end_call(session, running, missing[session])
        finally:
            schedule.close()
            self._running = None
            call.forget_objects()
        self._report(missing, running.result)

    def _end_call(self, session: Session, running: RunningCall, missing: list[Missing]) -> None:
        """Recordings of the instruments that had all their hookpoints; the others have nothing to record."""
        unreached = {id(what.instrument) for what in missing}
        values = {}
        for instrument in session.instruments:
            if id(instrument) not in unreached:
                with self._inside_instrument():
                    values[id(instrument)] = instrument.end_call(running.call)
        session.record(running.call, values)

    def _missing(self, session: Session, running: RunningCall) -> list[Missing]:
        """What a completed call did not reach.

        In a loop of the user's own a component that did not run at all was not meant to.
        """

        def meant(target: Target) -> bool:
            return not running.call.own_loop or target.root_name in running.roots

        missing = [
            Missing(place.instrument, str(place.hookpoint), place.target.family.never_reached)
            for place in session.places
            if place.hook not in running.reached and meant(place.target)
        ]
        for tap in session.taps:
            if id(tap.target.module) not in running.tapped and meant(tap.target):
                processor = type(getattr(tap.target.module, "processor", tap.target.module)).__name__
                why = (
                    f"its {processor} did not call F.scaled_dot_product_attention, or the module did not run: use the "
                    f"default processor (pipe.{tap.target.root_name}.set_attn_processor(AttnProcessor2_0())) and the "
                    f"native backend (pipe.{tap.target.root_name}.reset_attention_backend())"
                )
                missing.append(Missing(tap.instrument, f"the attention of {tap.target.path}", why))
        return missing

    @staticmethod
    def _report(missing: dict[Session, list[Missing]], result: Any) -> None:
        everything = {what.name: what.why for session in missing.values() for what in session}
        if everything:
            reasons = "; ".join(
                f"{', '.join(name for name in everything if everything[name] == why)} ({why})"
                for why in dict.fromkeys(everything.values())
            )
            message = f"the call completed without reaching {reasons}. Its result is this exception's `result`"
            raise HookpointNotReachedError(message, tuple(everything), result)

    @contextmanager
    def _inside_instrument(self) -> Iterator[None]:
        """Autocast is for the model: an instrument's arithmetic keeps the precision of its tensors."""
        before, self._in_instrument = self._in_instrument, True
        try:
            with ExitStack() as full_precision:
                for device in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(device):
                        full_precision.enter_context(torch.autocast(device, enabled=False))
                yield
        finally:
            self._in_instrument = before

    def _step_completed(self) -> None:
        running = self._running
        if running is None:
            return
        context = self._moment(running)
        for session in running.sessions:
            for instrument in session.instruments:
                with self._inside_instrument():
                    instrument.end_step(context)

    def _moment(self, running: RunningCall) -> Context:
        schedule = running.schedule
        return Context(
            step=schedule.step, n_steps=schedule.n_steps, fraction=schedule.fraction, prompts=running.call.prompts
        )

    # What the hooks do

    def _listening(self) -> bool:
        return bool(self.sessions) and not self._in_instrument and _backward_task() == -1

    def _current(self, target: Target) -> RunningCall:
        self.check_thread()
        if self._running is None:
            raise RuntimeError(
                f"{target.path} ran outside a call of the pipeline while a session is attached to it, so what step "
                "and which prompt it is cannot be told: write `with session.call(prompts=[...]):` around a loop of "
                "your own, or close the session first"
            )
        return self._running

    def _root_hook(self, target: Target) -> Callable[..., Any]:
        def before_root(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if module is target.module and self._listening():
                self._begin_root(target, self._current(target), args, kwargs)

        return before_root

    def _begin_root(self, target: Target, running: RunningCall, args: tuple, kwargs: dict[str, Any]) -> None:
        pipe = self._pipe()
        root = getattr(target.module, "_orig_mod", target.module)
        try:
            # The class's forward: offloading puts one on the instance that says (*args, **kwargs) in older versions.
            bound = inspect.signature(type(root).forward).bind_partial(root, *args, **kwargs)
            arguments = dict(list(bound.arguments.items())[1:])
        except TypeError:
            return  # the model's own error names the wrong argument
        batch = _batch(arguments)
        call, before = running.call, running.roots.get(target.path)
        earlier: tuple[int, ...] = ()
        if target.family.runs_in_steps:
            running.schedule.start(timestep_in(arguments))
            if before is not None and before.scheduled == running.schedule.done:
                earlier = (*before.earlier, len(before.entries[0]))
            if not call.own_loop:  # the caller of `session.call` said what the loop does
                guidance = getattr(pipe, "do_classifier_free_guidance", None)
                call.guidance = guidance if isinstance(guidance, bool) else call.guidance
            if call.scheduled is None and running.schedule.n_steps is not None:
                call.n_steps, call.scheduled = running.schedule.n_steps, running.schedule.timesteps
            entries = denoiser_entries(pipe, call, batch, earlier)
        elif target.family.stream == "text":
            entries = text_entries(call, batch, running.texts_seen.get(target.path, 0))
            running.texts_seen[target.path] = running.texts_seen.get(target.path, 0) + batch
        else:
            entries = outside_entries(batch)
        names = target.family.grid_arguments
        if names and before is not None and all(arguments.get(n) is before.arguments.get(n) for n in names):
            grid = before.run.grid  # reading it again would wait for the device at every run
        else:
            grid = target.family.image_grid(root, arguments)
        run = Run(root, arguments, grid)
        target.family.check_whole(pipe, call.arguments, run)
        running.roots[target.path] = RootRun(target, run, entries, running.schedule.done, earlier)
        context = replace(self._moment(running), condition=entries[0], prompt_index=entries[1], batch=batch)
        for session in running.sessions:
            for listener in session.listened:
                if listener.target.module is target.module:
                    with self._inside_instrument():
                        listener.instrument.at_component(target.root_name, arguments, context)

    def _root_run(self, running: RunningCall, target: Target, tensors: Any) -> RootRun:
        """The run of the component that is going on around one of its modules, which took or gave `tensors`."""
        run = running.roots.get(target.root_name)
        if run is None and not target.family.runs_in_steps and target.family.stream == "image":
            # `vae.decode` runs the decoder without `vae.forward`
            run = RootRun(target, Run(target.root, {}), outside_entries(_first_batch(tensors)))
        if run is None:
            raise RuntimeError(
                f"{target.path} ran without {target.root_name} around it, so its batch entries and grid cannot be told: "
                f"call pipe.{target.root_name}, or hook a module that this pipeline does not run on its own"
            )
        return run

    def _context(
        self,
        run: RootRun,
        target: Target,
        stream: str,
        shape: Sequence[int],
        device: torch.device,
        attention: int = 0,
        queries_of: int | None = None,
    ) -> Context:
        """The moment, for the rows of a tensor of this shape, [B, C, *grid] or [B, positions, C]; in the module's
        attention of this index, the queries of each of `queries_of` entries apart.
        """
        running, family = self._running, target.family
        assert running is not None
        extent = family.extent(target.inner, stream, run.run, shape)
        if queries_of is not None:  # a video's frames attend apart
            extent = replace(extent, batch=queries_of, positions=shape[1])
        conditions, images = spread(run.entries, extent.batch, attention)
        moment = self._moment(running) if family.runs_in_steps else Context(prompts=running.call.prompts)
        return replace(
            moment,
            condition=conditions,
            prompt_index=images,
            grid=extent.grid,
            stream=stream,
            batch=extent.batch,
            positions=extent.positions,
            device=device,
            _timestep=run.run.timestep,
        )

    def _after_hook(self, target: Target) -> Callable[..., Any]:
        key = (id(target.module), "after")

        def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            # A graph compiled for another block of the same class may call this with that block's output.
            if module is not target.module or self._in_instrument or not self.sessions:
                return None
            changed = output
            activations: Seen = {}
            edits: list[Edit] = []
            for place, context, run in self._visits(key, target, output):
                part = place.target.family.output_part(target.inner, place.stream, changed, run.run)
                if part is None:
                    continue
                whole = take(changed, part.index)
                base = None
                if place.hookpoint.io == "diff":
                    base = self._given(place, module, args, kwargs, run)
                edited = self._ask(place, context, run, activations, part, part.of(whole), base, edits)
                if edited is not None:
                    changed = put(changed, part.index, part.into(whole, edited))
            self._remember(key, edits)
            return None if changed is output else changed

        return after

    @staticmethod
    def _given(place: Place, module: nn.Module, args: tuple, kwargs: dict[str, Any], run: RootRun) -> torch.Tensor:
        """The place's stream in what the module was given."""
        target = place.target
        given = functools.partial(argument, module, args, kwargs)
        part = target.family.input_part(target.inner, place.stream, given, run.run)
        assert part is not None  # its output was of the stream
        return part.of(take_argument(module, part.name, args, kwargs))

    def _before_hook(self, target: Target) -> Callable[..., Any]:
        key = (id(target.module), "before")

        def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if module is not target.module or self._in_instrument or not self.sessions:
                return None
            changed = (args, kwargs)
            activations: Seen = {}
            edits: list[Edit] = []
            for place, context, run in self._visits(key, target, (args, kwargs)):
                given = functools.partial(argument, module, *changed)
                part = place.target.family.input_part(target.inner, place.stream, given, run.run)
                if part is None:
                    continue
                whole = take_argument(module, part.name, *changed)
                edited = self._ask(place, context, run, activations, part, part.of(whole), None, edits)
                if edited is not None:
                    changed = put_argument(module, part.name, *changed, part.into(whole, edited))
            self._remember(key, edits)
            return None if changed[0] is args and changed[1] is kwargs else changed

        return before

    def _visits(self, key: HookKey, target: Target, tensors: Any) -> Iterator[tuple[Place, Context | None, RootRun]]:
        """The instruments to ask at this hook, in order. In a backward pass (gradient checkpointing runs the forward
        again) only those that edited the run in question, with the context they had: the graph must come out the
        same, and nothing may be recorded twice. Elsewhere the context is made when the tensor is known.
        """
        if _backward_task() != -1:
            runs = self._replays.get(key)
            if runs:
                yield from ((edit.place, replace(edit.context, recomputing=True), edit.run) for edit in runs.pop())
            return
        running = self._current(target)
        running.reached.add(key)
        places = [place for session in running.sessions for place in session.places if place.hook == key]
        run = self._root_run(running, target, tensors) if places else None
        for place in places:
            assert run is not None
            yield place, None, run

    def _remember(self, key: HookKey, edits: list[Edit]) -> None:
        if torch.is_grad_enabled() and _backward_task() == -1:
            self._replays.setdefault(key, []).append(edits)

    def _ask(
        self,
        place: Place,
        context: Context | None,
        run: RootRun,
        activations: Seen,
        part: Part,
        tensor: torch.Tensor,
        base: torch.Tensor | None,
        edits: list[Edit],
    ) -> torch.Tensor | None:
        """Let one instrument see the tensor; the edited tensor, or None if it leaves it untouched."""
        hookpoint = place.hookpoint
        if base is not None and base.shape != tensor.shape:
            raise ValueError(
                f"{hookpoint} cannot be read: the block takes {list(base.shape)} and gives {list(tensor.shape)}, "
                "which have no difference; use its output"
            )
        seen = activations.get((hookpoint.io, part))
        if seen is None:
            seen = activations[hookpoint.io, part] = Activations(tensor if base is None else tensor - base)
        if context is None:
            context = self._context(run, place.target, place.stream, tensor.shape, tensor.device)
        context = replace(context, hookpoint=hookpoint)
        with self._inside_instrument():
            answer = place.instrument.at_hookpoint(seen, context) if place.instrument.active(context) else None
        if answer is None:
            return None
        edited = _edited(answer, hookpoint, place.instrument, tensor, base)
        for key in [key for key in activations if key[1] == part]:
            del activations[key]
        edits.append(Edit(place, context, run))
        return edited

    def _attention(self, target: Target, call: AttentionCall) -> None:
        running = self._current(target)
        running.tapped.add(id(target.module))
        taps = [tap for session in running.sessions for tap in session.taps if tap.target.module is target.module]
        if not taps:
            return  # attached in the middle of the call, by a callback: from the next call on
        batch, heads, queries, head_dim = call.query.shape
        run = self._root_run(running, target, call.query)
        streams = target.family.attention_streams(target.inner, run.run, queries)
        call = replace(call, streams=streams)
        shape = (batch, queries, heads * head_dim)
        context = self._context(run, target, target.family.stream, shape, call.query.device, call.index, batch)
        if streams:
            context = replace(context, grid=run.run.grid)  # of the queries that are the image's
        context = replace(context, hookpoint=Hookpoint(target.path))
        for tap in taps:
            with self._inside_instrument():
                if tap.instrument.active(context):
                    tap.instrument.at_attention(call, context)


def _batch(arguments: Mapping[str, Any]) -> int:
    """The batch size of a model's run: that of the first tensor among its arguments, or of a list of latents."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
        if isinstance(value, list) and value and all(isinstance(entry, torch.Tensor) for entry in value):
            return len(value)
    return 0


def _first_batch(tensors: Any) -> int:
    """The batch size of a module that ran on its own: that of the first tensor in what it took or gave."""
    if isinstance(tensors, torch.Tensor):
        return tensors.shape[0]
    values = tensors.values() if isinstance(tensors, Mapping) else tensors if isinstance(tensors, (tuple, list)) else ()
    return next((batch for batch in map(_first_batch, values) if batch), 0)


def _channels(tensor: torch.Tensor) -> int:
    return tensor.shape[1] if tensor.ndim > 3 else tensor.shape[-1]


def _edited(
    answer: Any, hookpoint: Hookpoint, instrument: Instrument, tensor: torch.Tensor, base: torch.Tensor | None
) -> torch.Tensor:
    """The block's tensor after a Delta or a Replace: one addition in float32 (or wider), one rounding."""
    who = f"{type(instrument).__name__} at {hookpoint}"
    if not isinstance(answer, (Delta, Replace)):
        raise TypeError(f"{who} answered {type(answer).__name__}; answer None, Delta(rows) or Replace(rows)")
    shape = (tensor.numel() // max(_channels(tensor), 1), _channels(tensor))
    rows = answer.rows
    try:
        rows = rows.to(tensor.device).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{who} answered rows of shape {list(rows.shape)}, but the activations there are {list(shape)} "
            "[batch * positions, d_model]"
        ) from None
    wide = torch.promote_types(tensor.dtype, torch.float32)
    rows = like_tensor(rows, tensor).to(wide)
    onto = tensor if isinstance(answer, Delta) else base  # a replaced difference goes onto the block's input
    edited = (rows if onto is None else onto.to(wide) + rows).to(tensor.dtype)
    if edited.stride() != tensor.stride():
        # Convolutions choose their algorithm, and so their rounding, by the memory format: keep the block's.
        edited = torch.empty_like(tensor).copy_(edited)
    return edited
