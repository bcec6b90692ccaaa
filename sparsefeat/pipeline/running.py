"""One call of a pipeline while it runs: what is asked of it, and what is known of each run of its models."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsefeat.pipeline.context import Call, Context
from sparsefeat.pipeline.families.family import Run, UnknownRowsError, timestep_in
from sparsefeat.pipeline.hookpoints import Hookpoint, Target
from sparsefeat.pipeline.hooks import HookKey
from sparsefeat.pipeline.instrument import Instrument
from sparsefeat.pipeline.knowing.conditions import (
    Conditions,
    DenoiserRun,
    Entries,
    is_diffusers_own,
    outside_entries,
    spread,
)
from sparsefeat.pipeline.knowing.guiders import Guiders
from sparsefeat.pipeline.knowing.references import References
from sparsefeat.pipeline.knowing.steps import Loop, Steps
from sparsefeat.pipeline.knowing.texts import TextRows
from sparsefeat.pipeline.outputs import put_argument
from sparsefeat.pipeline.weights import rest

if TYPE_CHECKING:
    from sparsefeat.pipeline.attachment import Attachment

_calls = threading.local()


def calls_here() -> list[RunningCall]:
    """The calls of attached pipelines that run in this thread, the innermost last."""
    return vars(_calls).setdefault("running", [])


class Guard:
    """Whether an instrument is at work: what it runs of the pipeline itself is not hooked."""

    def __init__(self) -> None:
        self.up: bool = False

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Autocast is for the model: an instrument's arithmetic keeps the precision of its tensors."""
        before = self.up
        try:
            self.up = True
            with ExitStack() as full_precision:
                for device in ("cpu", "cuda"):
                    if torch.is_autocast_enabled(device):
                        full_precision.enter_context(torch.autocast(device, enabled=False))
                yield
        finally:
            self.up = before


@dataclass(eq=False)
class RootRun:
    """One run of a component: its arguments, from which the grid is known, and the entries of its batch."""

    target: Target
    run: Run
    entries: Entries
    loop: Loop | None = None
    """The way through the schedule that it is in."""
    evaluation: int = 0
    """How many scheduler steps of the loop came before it."""
    earlier: tuple[int, ...] = ()
    """The batch sizes of the runs before it in the same step."""

    @property
    def arguments(self) -> Mapping[str, Any]:
        return self.run.arguments

    @property
    def timestep(self) -> Any:
        """The model's timestep, or the scheduler's where the model has one for every token (0 at given frames)."""
        given = self.run.timestep
        if not isinstance(given, torch.Tensor) or given.numel() <= max(len(self.entries[0]), 1):
            return given
        own = None if self.loop is None else self.loop.timestep
        return given.amax() if own is None else own


@dataclass(eq=False)
class RunningCall:
    """The state of the call that is going on."""

    pipe: Any
    call: Call
    attachments: tuple[Attachment, ...]
    guard: Guard
    changed: Callable[[], None]
    """What to do when hooks were put on the models, or taken off, in the middle of the call."""
    result: Any = None
    is_cut_short: bool = False
    """An instrument had enough of it."""
    over: bool = False
    """The pipeline's own call has ended, though an interrupt may have kept it from being closed."""
    roots: dict[str, RootRun] = field(default_factory=dict)
    reached: set[HookKey] = field(default_factory=set)
    tapped: set[int] = field(default_factory=set)
    asked: dict[int, bool] = field(default_factory=dict)
    """Of each instrument that was reached, by id: whether it was ever its time."""
    conditions_seen: dict[int, set[str]] = field(default_factory=dict)
    """The conditions of the rows that each was then asked about."""
    _decoded: dict[HookKey, int] = field(default_factory=dict)
    """How often each module of a VAE ran, by its hook."""

    def __post_init__(self) -> None:
        guard, me = self.guard, weakref.ref(self)  # what hears the call does not keep it, nor its recordings

        def deaf() -> bool:
            return guard.up

        def completed(loop: Loop) -> None:
            running = me()
            if running is not None:
                running._step_completed(loop)

        def stepping(loop: Loop, sample: torch.Tensor) -> torch.Tensor:
            running = me()
            return sample if running is None else running._stepping(loop, sample)

        layouts = [attachment.layout for attachment in self.attachments if attachment.layout is not None]
        # A loop that is not diffusers' own leaves the `num_timesteps` of an earlier call, and may not step its scheduler.
        own_loop = self.call.own_loop or not is_diffusers_own(self.pipe)
        self.references: References = References(self.call, trusted=not own_loop)
        self.conditions: Conditions = Conditions(self.call, self.references, layouts[-1] if layouts else None)
        self.texts: TextRows = TextRows(self.call, self.references)
        self.steps: Steps = Steps(self.pipe, completed, stepping, deaf, own_loop)
        self.guiders: Guiders = Guiders(self.pipe, self.changed, deaf)

    def open(self) -> None:
        calls_here().append(self)
        self.steps.open()
        self.guiders.open()
        self.references.add_arguments()
        for attachment in self.attachments:
            for instrument in attachment.instruments:
                with self.guard.raised():
                    instrument.begin_call(self.call)

    def refuse_what_is_at_work(self) -> None:
        """An instrument keeps one call at a time: a call inside another's callback needs one of its own."""
        mine = [instrument for attachment in self.attachments for instrument in attachment.instruments]
        for other in calls_here():
            for instrument in (instrument for attachment in other.attachments for instrument in attachment.instruments):
                if any(instrument is one for one in mine):
                    raise RuntimeError(
                        f"this {type(instrument).__name__} is at work in a call of {type(other.pipe).__name__}, inside which "
                        f"{type(self.pipe).__name__} was called: attach another one to the inner pipeline"
                    )

    def close(self) -> None:
        """Doing it twice is harmless."""
        self.steps.close()
        self.guiders.close()
        for attachment in self.attachments:
            for place in attachment.weights:
                rest(place, False)
        if self in calls_here():
            calls_here().remove(self)

    def _step_completed(self, loop: Loop) -> None:
        context = self.moment(loop)
        for attachment in self.attachments:
            for instrument in attachment.instruments:
                with self.guard.raised():
                    instrument.end_step(context)

    def _stepping(self, loop: Loop, sample: torch.Tensor) -> torch.Tensor:
        """What the scheduler is to step from."""
        context = self.moment(loop)
        for attachment in self.attachments:
            for instrument in attachment.instruments:
                with self.guard.raised():
                    other = instrument.before_step(sample, context)
                if other is not None:
                    _check_like(instrument, "before_step", "the latents", other, sample)
                    sample = other
        return sample

    def moment(self, loop: Loop | None, **more: Any) -> Context:
        if loop is None:
            return Context(prompts=self.call.prompts, **more)
        return Context(
            step=loop.step,
            n_steps=loop.n_steps,
            fraction=loop.fraction,
            loop=loop.index,
            evaluation=loop.done,
            prompts=self.call.prompts,
            **more,
        )

    # Runs of the components

    def begin_root(
        self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """A component is about to run: the arguments to run it on in the place of these, None for the same."""
        root = getattr(target.module, "_orig_mod", target.module)
        arguments = _named(root, args, kwargs)
        if arguments is None:
            return None  # the model's own error names the wrong argument
        batch = _batch(arguments)
        before = self.roots.get(target.path)
        if target.family.runs_in_steps:
            run = self._denoiser_run(target, root, arguments, batch, before)
        elif target.family.stream == "text":
            entries = self.texts.entries(self.pipe, target.root_name, arguments, batch)
            run = RootRun(target, self._run(target, root, arguments), entries)
        else:
            run = RootRun(target, self._run(target, root, arguments), outside_entries(batch))
        target.family.check_whole(self.pipe, self.call.arguments, run.run)
        self.roots[target.path] = run
        conditions, images = run.entries
        context = self.moment(run.loop, condition=conditions, prompt_index=images, batch=batch)
        self._change_weights(target.module, context)
        changed: dict[str, torch.Tensor] = {}
        for attachment in self.attachments:
            for listener in attachment.listened:
                if listener.target.module is target.module:
                    with self.guard.raised():
                        answer = listener.instrument.at_component(target.root_name, {**arguments, **changed}, context)
                    for name, tensor in (answer or {}).items():
                        _check_like(listener.instrument, "at_component", f"{name!r}", tensor, arguments.get(name))
                        changed[name] = tensor
        for name, tensor in changed.items():
            args, kwargs = put_argument(target.module, name, args, kwargs, tensor)
        return (args, kwargs) if changed else None

    def _change_weights(self, root: nn.Module, context: Context) -> None:
        """Put the changes of this component's weights in whose steps these are, and out the others."""
        for attachment in self.attachments:
            for place in attachment.weights:
                if place.target.root is root:
                    with self.guard.raised():
                        active = place.instrument.active(context)
                    self.asked[id(place.instrument)] = self.asked.get(id(place.instrument), False) or active
                    rest(place, not active)

    def _denoiser_run(
        self, target: Target, root: nn.Module, arguments: dict[str, Any], batch: int, before: RootRun | None
    ) -> RootRun:
        call = self.call
        loop = self.steps.begin_run(target.root_name, timestep_in(arguments))
        evaluation = 0 if loop is None else loop.done
        earlier: tuple[int, ...] = ()
        if before is not None and before.loop is loop and before.evaluation == evaluation:
            earlier = (*before.earlier, len(before.entries[0]))
        if not call.own_loop:  # the caller of `session.call` said what the loop does
            guidance = getattr(self.pipe, "do_classifier_free_guidance", None)
            if isinstance(guidance, torch.Tensor) and before is None:
                guidance = bool(guidance.any())  # a scale for each frame: one wait a call
            call.guidance = guidance if isinstance(guidance, bool) else call.guidance
        if loop is not None and loop.n_steps is not None and (call.scheduled is None or self._is_main(loop)):
            call.n_steps, call.scheduled = loop.n_steps, loop.timesteps
        asked = DenoiserRun(target.root_name, arguments, batch, earlier, 0 if loop is None else loop.index)
        entries = self.conditions.entries(self.pipe, asked, self.guiders.condition)
        return RootRun(target, self._run(target, root, arguments), entries, loop, evaluation, earlier)

    def _is_main(self, loop: Loop) -> bool:
        return loop.index == 0 and loop.scheduler is getattr(self.pipe, "scheduler", None)

    def passed_through(self, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A text encoder, or a component between these and the denoiser, has run."""
        if target.family.stream == "text":
            arguments = _named(getattr(target.module, "_orig_mod", target.module), args, kwargs) or {}
            texts, pipe = self.texts, self.pipe  # not self: what waits to be compared would keep the call alive
            self.references.ran(lambda: texts.references(pipe, target.root_name, arguments, output))
        elif not self.references.encodings:  # what a method that encodes returns is told by the method
            self.conditions.passed_through((*args, *kwargs.values()), output)

    @staticmethod
    def _run(target: Target, root: nn.Module, arguments: dict[str, Any]) -> Run:
        return Run(root, arguments, target.family.image_grid(root, arguments))

    def root_run(self, target: Target, tensors: Any, hook: str) -> RootRun:
        """The run of the component that is going on around one of its modules, whose `hook` was given `tensors`."""
        run = self.roots.get(target.root_name)
        if run is None and not target.family.runs_in_steps and target.family.stream == "image":
            # `vae.decode` runs the decoder without `vae.forward`
            run = RootRun(target, Run(target.root, {}), self._outside_the_steps(target, _first_tensor(tensors), hook))
        if run is None:
            raise RuntimeError(
                f"{target.path} ran without {target.root_name} around it, so its batch entries and grid cannot be told: "
                f"call pipe.{target.root_name}, or hook a module that this pipeline does not run on its own"
            )
        return run

    def _outside_the_steps(self, target: Target, tensor: torch.Tensor | None, hook: str) -> Entries:
        """The entries of a VAE's run: all images at once, or it is not known which they are."""
        batch, n_images = (0, self.call.n_images) if tensor is None else (len(tensor), self.call.n_images)
        is_video = any(len(run.run.grid or ()) == 3 for run in self.roots.values())
        shares = n_images is None or batch == n_images or (_encodes(target) and batch and n_images % batch == 0)
        key = id(target.module), hook
        parts, self._decoded[key] = self._decoded.get(key, 0), self._decoded.get(key, 0) + 1
        refused = any(getattr(target.root, f"use_{part}", False) for part in ("tiling", "slicing"))  # by its family
        if refused or target.family.stated_rows is not None:
            return outside_entries(batch)
        in_parts = is_video and tensor is not None and (tensor.ndim < 5 or (parts and not _encodes(target)))
        if not shares or in_parts:
            raise UnknownRowsError(
                target.path,
                target.module,
                f"{type(self.pipe).__name__} runs it on some of the images or frames at a time",
            )
        return outside_entries(batch)

    def context(
        self,
        run: RootRun,
        target: Target,
        hookpoint: Hookpoint,
        stream: str,
        shape: Sequence[int],
        device: torch.device,
        attention: int = 0,
        queries_of: int | None = None,
    ) -> Context:
        """The moment, for the rows of a tensor of this shape, [B, C, *grid] or [B, positions, C]; in the module's
        attention of this index, the queries of each of `queries_of` entries apart.
        """
        extent = target.family.extent(target.inner, stream, run.run, shape)
        if queries_of is not None:  # a video's frames attend apart
            extent = replace(extent, batch=queries_of, positions=shape[1])
        folded = shape[0] if queries_of is None and shape[0] % extent.batch == 0 else extent.batch
        conditions, images = spread(run.entries, folded, attention)
        return self.moment(
            run.loop,
            hookpoint=hookpoint,
            condition=conditions,
            prompt_index=images,
            grid=extent.grid,
            stream=stream,
            batch=extent.batch,
            positions=extent.positions,
            device=device,
            _timestep=run.timestep,
        )


def _check_like(instrument: Instrument, method: str, what: str, answer: Any, given: Any) -> None:
    if not isinstance(answer, torch.Tensor) or not isinstance(given, torch.Tensor) or answer.shape != given.shape:
        raise ValueError(
            f"{type(instrument).__name__}.{method} answered {_said(answer)} in the place of {what}, which is {_said(given)}; "
            "answer a tensor of that shape, or None"
        )


def _said(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _named(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The arguments of a model's forward by name; None if it does not take these."""
    try:
        # The class's forward: offloading puts one on the instance that says (*args, **kwargs) in older versions.
        bound = inspect.signature(type(root).forward).bind_partial(root, *args, **kwargs)
    except TypeError:
        return None
    return dict(list(bound.arguments.items())[1:])


def _batch(arguments: Mapping[str, Any]) -> int:
    """The batch size of a model's run: that of the first tensor among its arguments, or of a list of latents."""
    for value in arguments.values():
        if isinstance(value, torch.Tensor) and value.ndim:
            return value.shape[0]
        if isinstance(value, list) and value and all(isinstance(entry, torch.Tensor) for entry in value):
            return len(value)
    return 0


def _first_tensor(tensors: Any) -> torch.Tensor | None:
    """The first tensor in what a module took or gave."""
    if isinstance(tensors, torch.Tensor):
        return tensors if tensors.ndim else None
    values = tensors.values() if isinstance(tensors, Mapping) else tensors if isinstance(tensors, (tuple, list)) else ()
    return next((found for found in map(_first_tensor, values) if found is not None), None)


def _encodes(target: Target) -> bool:
    """Whether it is in the half of a VAE that encodes: it may run on one image for all, or on several one by one."""
    return target.inner.partition(".")[0] == "encoder"
