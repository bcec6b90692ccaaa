"""`attach`, the only way in, the `Session` it gives, and `detach`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from sparsefeat.arguments import NotThere, on_the_cpu_by_default, truth, whole
from sparsefeat.pipeline.attachment import Attachment, Recordings, Records, refuse_a_shared_sequence
from sparsefeat.pipeline.base_models import difference
from sparsefeat.pipeline.call_arguments import check_pipeline
from sparsefeat.pipeline.compiled import refuse_compiled
from sparsefeat.pipeline.context import CONDITIONS, Call
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import Hookpoint, Target, components, resolve
from sparsefeat.pipeline.instrument import Instrument
from sparsefeat.pipeline.visits import Place, Tap, check_width
from sparsefeat.pipeline.weakly import Weakly
from sparsefeat.pipeline.weights import WeightChange, WeightPlace, plain_weight
from sparsefeat.pipeline.wiring import Wiring

T = TypeVar("T")
CLOSED = "the session is closed; attach again"


def attach(
    pipe: Any, *instruments: Instrument, layout: Sequence[str] | Sequence[Sequence[str]] | None = None
) -> Session:
    """Attach instruments to a pipeline. They are active at once, until the `with` block, `.close()` or `detach` ends it. A
    call that is going on has no part in them.

        with sf.attach(pipe, rec, steer) as run:
            image = pipe("a fox").images[0]
        run[rec]

    Instruments at one hookpoint run in the order given, each on what the one before left; those of an earlier session
    that is still open run before. Errors of names and widths are raised here, before anything is changed.

    Several pipelines, `attach((base, refiner), rec)`, have one session: the same instruments are at the same hookpoints of
    each, and `run.calls` has the calls of all in the order they ended.

    Args:
        pipe: a pipeline, or a list or tuple of them.
        layout: which conditions one denoising step runs, for a pipeline of which that cannot be told: the chunks of one
            run of the denoiser, ("uncond", "cond"), or one such tuple for each run, [("cond",), ("uncond",)]. A call
            whose texts say otherwise is refused.

    Raises:
        TypeError: `pipe` is no pipeline, or an instrument no Instrument.
        RuntimeError: another thread attached to it; torch's default device is not the CPU.
        ValueError: no instrument, or one twice; a hookpoint that is not there (the nearest are named) or of another
            width; a `layout` that cannot be.
    """
    if isinstance(pipe, (list, tuple)):
        return _attach_to_each(pipe, instruments, layout)
    check_pipeline(pipe)
    on_the_cpu_by_default()
    for position, instrument in enumerate(instruments):
        if not isinstance(instrument, Instrument):
            # negative_prompt and its kin make arguments of a call.
            where = (
                "give it to the call, pipe(prompt, **it)"
                if isinstance(instrument, dict)
                else "attach takes the pipeline first and instruments after it"
            )
            raise TypeError(f"instruments[{position}] is {type(instrument).__name__}, not an Instrument; {where}")
    if not instruments:
        raise ValueError("attach(pipe) was given no instrument; give at least one after the pipeline")
    instruments = tuple(part for instrument in instruments for part in instrument.members())
    for position, instrument in enumerate(instruments):
        if any(instrument is earlier for earlier in instruments[:position]):
            raise ValueError(f"instruments[{position}] ({type(instrument).__name__}) was given twice; give it once")
    stated = _runs(layout)
    wiring = Wiring.of(pipe)
    wiring.check_thread()
    for instrument in instruments:
        if any(instrument is other for attachment in wiring.attachments for other in attachment.instruments):
            raise ValueError(
                f"this {type(instrument).__name__} is attached to this pipeline in a session that is still open, and "
                "would act twice; close that one (sparsefeat.detach(pipe) closes all), or make a second instrument"
            )
    for instrument in instruments:
        instrument.prepare(pipe)
    places = tuple(
        _place(pipe, instrument, Hookpoint.parse(h) if isinstance(h, str) else h)
        for instrument in instruments
        for h in instrument.hookpoints()
    )
    taps = tuple(
        Tap(instrument, _checked(resolve(pipe, path)))
        for instrument in instruments
        for path in instrument.attentions(pipe)
    )
    listened = tuple(
        Tap(instrument, resolve(pipe, name))  # one that was compiled is not heard, and need not be
        for instrument in instruments
        for name in instrument.components(pipe)
    )
    weights = tuple(
        _weight_place(pipe, instrument, path, change)
        for instrument in instruments
        for path, change in instrument.weights(pipe).items()
    )
    between = tuple(
        Target(name, root, name, root, family)
        for name, root in components(pipe).items()
        if (family := family_of(root)).makes_embeddings
    )
    wiring = Wiring.of(pipe)  # `prepare` may have opened and closed sessions of its own
    attachment = Attachment(pipe, instruments, places, taps, listened, between, weights, stated)
    session = Session(wiring, attachment)
    try:
        wiring.add(attachment)
        return session
    except BaseException:
        session.close()
        raise


def detach(pipe: Any) -> None:
    """Close every session that is open at a pipeline (or at each of a list of them), also one that nobody kept.

    Raises:
        TypeError: `pipe` is no pipeline.
        RuntimeError: another thread attached to it.
    """
    if isinstance(pipe, (list, tuple)):
        for one in pipe:
            detach(one)
        return
    check_pipeline(pipe)
    wiring = Wiring.of(pipe)
    for attachment in tuple(wiring.attachments):
        wiring.check_thread()
        session = attachment.session
        if session is None:
            wiring.remove(attachment)
        else:
            session.close()


def _attach_to_each(pipes: Sequence[Any], instruments: tuple[Instrument, ...], layout: Any) -> Session:
    if not pipes:
        raise ValueError("attach was given an empty list of pipelines; give at least one")
    if len({id(pipe) for pipe in pipes}) < len(pipes):
        raise ValueError("attach was given a pipeline twice in its list; give each once")
    sessions: list[Session] = []
    try:
        for pipe in pipes:
            sessions.append(attach(pipe, *instruments, layout=layout))
        sessions[0].lead(sessions[1:])
        return sessions[0]
    except BaseException:
        for session in sessions:
            session.close()
        raise


class _Entering(property):
    """A property of the session, and of its class what `ExitStack` calls."""

    def __call__(self, session: Session) -> Session:
        return session


class Session:
    """An `attach` that is going on, or has ended: recordings stay readable after it."""

    def __init__(self, wiring: Wiring, attachment: Attachment):
        self.instruments: tuple[Instrument, ...] = attachment.instruments
        self.calls: list[Recordings] = attachment.calls
        """The completed calls, in order."""
        self.beside: tuple[Session, ...] = ()
        """Where several pipelines have one session: what it is at the others."""
        self._wiring: Wiring | None = wiring
        self._attachment = attachment
        attachment.belongs_to(self)

    @property
    def _pipe(self) -> Any:
        """None once nothing of the session is in it."""
        return self._attachment.pipe

    def __repr__(self) -> str:
        state = "open" if self._wiring is not None else "closed"
        return f"Session({self._attachment.names}; {len(self.calls)} calls, {state})"

    def __getitem__(self, instrument: Records[T]) -> T:
        """The recording of the last completed call; `run.calls[i][instrument]` is that of each call."""
        if not self.calls:
            raise NotThere("no call of the pipeline has completed in this session; call it first")
        return self.calls[-1][instrument]

    def lead(self, others: Sequence[Session]) -> None:
        """Be one session with those of other pipelines (`attach` does this)."""
        self.beside = tuple(others)
        for session in others:
            session.calls = session._attachment.calls = self.calls
            session._attachment.is_one_of_several = self._attachment.is_one_of_several = True

    @contextmanager
    def call(
        self,
        prompts: str | list[str] | None = None,
        *,
        images_per_prompt: int = 1,
        guidance: bool = False,
        n_steps: int | None = None,
        pipe: Any = None,
    ) -> Iterator[Call]:
        """One call of the pipeline, for a denoising loop of your own or for running its parts (`encode_prompt`).

        Modules that are hooked may only run inside `pipe(...)` or inside this. `guidance` says whether the denoiser's
        batch is [uncond, cond], or that it runs on one and then on the other, the conditional first; the steps are
        those of `pipe.scheduler`. Without prompts an even batch is taken for the two halves: give them where one run is of one
        condition, or state it, `attach(..., layout=[("cond",), ("uncond",)])`. `pipe` says which of the session's pipelines it is, where there are several.

        Raises:
            RuntimeError: the session is closed.
            ValueError: it is not attached to `pipe`; an argument that cannot be, by its name.
        """
        if self._wiring is None:
            raise RuntimeError(CLOSED)
        texts = [prompts] if isinstance(prompts, str) else prompts
        if not (texts is None or (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts))):
            raise ValueError(f"prompts={prompts!r:.80} must be a text or a list of texts.")
        whole("images_per_prompt", images_per_prompt)
        truth("guidance", guidance)
        mine = self._pipe
        if pipe is not None and pipe is not mine:
            other = next((session for session in self.beside if session._attachment.pipe is pipe), None)
            if other is None:
                raise ValueError(
                    f"pipe= is a {type(pipe).__name__} that this session is not attached to; give one that is"
                )
            with other.call(prompts, images_per_prompt=images_per_prompt, guidance=guidance, n_steps=n_steps) as call:
                yield call
            return
        call = Call(
            prompts=None if texts is None else list(texts),
            images_per_prompt=images_per_prompt,
            guidance=guidance,
            n_steps=n_steps,
            own_loop=True,
            pipe_ref=Weakly(mine),
        )
        with self._wiring.calling(call):
            yield call

    def close(self) -> None:
        """Take everything out of the pipeline. Closing twice is harmless, and so is the order of nested sessions."""
        for session in self.beside:
            session.close()
        wiring = self._wiring
        if wiring is not None:
            wiring.remove(self._attachment)
            self._wiring = None  # not before: a close that was interrupted is finished by the next
        self._attachment.forget()
        self.__class__ = _Closed

    if TYPE_CHECKING:

        def __enter__(self) -> Session: ...

    else:
        # {}.get(None, session) is the session. No line of Python runs in it: one could be interrupted, and `with` would not
        # close what it had not yet entered.
        __enter__ = _Entering(partial(partial, {}.get, None))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a session is of its pipeline and is not copied; copy what it recorded, run[instrument]")


class _Closed(Session):
    """A session that was closed: nothing would be recorded or edited in a `with` block of it."""

    def __enter__(self) -> Session:
        raise RuntimeError(CLOSED)


def _place(pipe: Any, instrument: Instrument, hookpoint: Hookpoint) -> Place:
    target = _checked(resolve(pipe, hookpoint.path))
    family = target.family.stating(hookpoint.rows)
    target = replace(target, family=family)
    io = "input" if hookpoint.io == "input" else "output"
    width = family.width(target.module, io)
    if width is not None:
        check_width(instrument, hookpoint, width, f" in this {type(pipe).__name__}")
    differs = difference(pipe, instrument.base_model(), target.path)
    if differs is not None:
        warnings.warn(f"{type(instrument).__name__} at {hookpoint}: {differs}", stacklevel=4)
    given = family.width(target.module, "input")
    if hookpoint.io == "diff" and None not in (width, given) and width != given:
        raise ValueError(
            f"{hookpoint} has no difference: the block takes width {given} and gives {width}; use its output"
        )
    stream = family.stream_at(target.inner, target.module, hookpoint.stream)
    if stream is None:
        raise ValueError(
            f"{hookpoint.path} has no {hookpoint.stream} stream in this {type(pipe).__name__}, only "
            f"{' and '.join(family.streams(target.inner, target.module))}: ask for that, or for another block"
        )
    return Place(instrument, hookpoint, target, stream)


def _weight_place(pipe: Any, instrument: Instrument, path: str, change: WeightChange) -> WeightPlace:
    target = resolve(pipe, path)
    # Compiled code reads weights anew at every run; whether it is their step is asked of the component's own hook.
    refuse_compiled(replace(target, path=target.root_name, module=target.root))
    return WeightPlace(instrument, target, plain_weight(target), change)


def _checked(target: Target) -> Target:
    refuse_compiled(target)
    refuse_a_shared_sequence(target)
    return target


def _runs(layout: Any) -> tuple[tuple[str, ...], ...] | None:
    """A stated layout as one tuple of conditions for each run of a step."""
    if layout is None:
        return None
    runs = (layout,) if all(isinstance(condition, str) for condition in layout) else layout
    runs = tuple(tuple(run) for run in runs)
    if not runs or not all(run and all(condition in CONDITIONS for condition in run) for run in runs):
        raise ValueError(
            f"layout={layout!r} is not the conditions of a run's chunks, as ('uncond', 'cond'), or a list of such for the "
            f"runs of a step; the conditions are {', '.join(CONDITIONS)}"
        )
    return runs
