"""What happens when a hooked module runs: the instruments there are asked, each on what the one before left, and their
edits are put into what the module gave or is given.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.context import HOW_TO_STATE, UNKNOWN, Context, UnknownConditionError
from sparsefeat.pipeline.hookpoints import Hookpoint, Target
from sparsefeat.pipeline.hooks import HookKey
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
from sparsefeat.pipeline.running import Guard, RootRun, RunningCall

# The autograd engine runs backward passes in threads of its own; -1 is "not in a backward pass".
_backward_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)

Seen = dict[tuple[str, Part], Activations]  # by io and part: what instruments at one hook share


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
        """The hook that serves it: the module, and before or after its forward."""
        return id(self.target.module), "before" if self.hookpoint.io == "input" else "after"


def check_width(instrument: Instrument, hookpoint: Hookpoint, width: int, where: str = "") -> None:
    wanted = instrument.expected_width(hookpoint)
    if wanted is not None and width != wanted:
        raise ValueError(
            f"{type(instrument).__name__} needs activations of width {wanted}, but {hookpoint} is {width} wide{where}: its "
            "SAE was made for another model or another hookpoint"
        )


@dataclass(frozen=True, eq=False)
class Tap:
    """One instrument at one attention module, or listening to one component."""

    instrument: Instrument
    target: Target


@dataclass(frozen=True, eq=False)
class Edit:
    """One instrument's edit of one run of a module: what is needed to do it again."""

    place: Place
    context: Context
    run: RootRun


class Visits:
    """The visits at the modules of one pipeline, and what checkpointed modules need to run again in a backward pass."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._replays: dict[HookKey, list[list[Edit]]] = {}  # the last run's context comes first there

    def forget(self) -> None:
        self._replays.clear()

    def after(
        self, running: RunningCall | None, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """The module gave `output`: what to go on with in its place, None for the same."""
        module = target.module
        changed = output
        activations: Seen = {}
        edits: list[Edit] = []
        key = (id(module), "after")
        if _handed_on(module, args, kwargs, output):
            if running is not None:
                running.reached.add(key)
            return None
        for place, context, run in self._visits(key, running, target, output):
            part = place.target.family.output_part(target.inner, place.stream, changed, run.run)
            if part is None:
                continue
            whole = take(changed, part.index)
            base = None
            if place.hookpoint.io == "diff":
                base = _given(place, module, args, kwargs, run)
            edited = self._ask(running, place, context, run, activations, part, part.of(whole), base, edits)
            if edited is not None:
                changed = put(changed, part.index, part.into(whole, edited))
        self._remember(key, edits)
        return None if changed is output else changed

    def before(self, running: RunningCall | None, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The module is given these arguments: those to go on with in their place, None for the same."""
        module = target.module
        changed = (args, kwargs)
        activations: Seen = {}
        edits: list[Edit] = []
        key = (id(module), "before")
        for place, context, run in self._visits(key, running, target, (args, kwargs)):
            given = functools.partial(argument, module, *changed)
            part = place.target.family.input_part(target.inner, place.stream, given, run.run)
            if part is None:
                continue
            whole = take_argument(module, part.name, *changed)
            edited = self._ask(running, place, context, run, activations, part, part.of(whole), None, edits)
            if edited is not None:
                changed = put_argument(module, part.name, *changed, part.into(whole, edited))
        self._remember(key, edits)
        return None if changed[0] is args and changed[1] is kwargs else changed

    def _visits(
        self, key: HookKey, running: RunningCall | None, target: Target, tensors: Any
    ) -> Iterator[tuple[Place, Context | None, RootRun]]:
        """The instruments to ask at this hook, in order. In a backward pass (gradient checkpointing runs the forward
        again) only those that edited the run in question, with the context they had: the graph must come out the
        same, and nothing may be recorded twice. Elsewhere the context is made when the tensor is known.
        """
        if in_backward():
            runs = self._replays.get(key)
            if runs:
                yield from ((edit.place, replace(edit.context, recomputing=True), edit.run) for edit in runs.pop())
            return
        assert running is not None
        running.reached.add(key)
        places = [place for attachment in running.attachments for place in attachment.places if place.hook == key]
        run = running.root_run(target, tensors, key[1]) if places else None
        for place in places:
            assert run is not None
            yield place, None, run

    def _remember(self, key: HookKey, edits: list[Edit]) -> None:
        if torch.is_grad_enabled() and not in_backward():
            self._replays.setdefault(key, []).append(edits)

    def _ask(
        self,
        running: RunningCall | None,
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
        with self._guard.raised():
            if context is None:
                assert running is not None
                context = running.context(run, place.target, hookpoint, place.stream, tensor.shape, tensor.device)
                if not _is_its_turn(running, place.instrument, context):
                    return None
            check_width(place.instrument, hookpoint, seen.width)  # of a family that could not say it before
            answer = place.instrument.at_hookpoint(seen, context)
        if answer is None:
            return None
        edited = _edited(answer, hookpoint, place.instrument, tensor, base)
        for key in [key for key in activations if key[1] == part]:
            del activations[key]
        edits.append(Edit(place, context, run))
        return edited

    def attention(self, running: RunningCall, target: Target, call: AttentionCall) -> None:
        """A tapped attention module has attended."""
        running.tapped.add(id(target.module))
        taps = [
            tap for attachment in running.attachments for tap in attachment.taps if tap.target.module is target.module
        ]
        if not taps:
            return  # attached in the middle of the call, by a callback: from the next call on
        batch, heads, queries, head_dim = call.query.shape
        run = running.root_run(target, call.query, "attention")
        streams = target.family.attention_streams(target.inner, run.run, queries)
        call = replace(call, reads_text=target.family.reads_text(target.inner, run.run, call.index))
        shape = (batch, queries, heads * head_dim)
        where = Hookpoint(target.path)
        context = running.context(run, target, where, target.family.stream, shape, call.query.device, call.index, batch)
        if streams:
            context = replace(context, grid=run.run.grid)  # of the queries that are the image's
        if isinstance(streams, tuple):  # one for each batch entry
            longest = max((stop - start for own in streams for start, stop in [own.get("text", (0, 0))]), default=0)
            moments = [
                (
                    replace(call.entry(row), streams=own, text_tokens=longest),
                    replace(context, condition=(condition,), prompt_index=(image,), batch=1),
                )
                for row, (own, condition, image) in enumerate(
                    zip(streams, context.condition, context.prompt_index, strict=True)
                )
            ]
        else:
            moments = [(replace(call, streams=streams), context)]
        for tap in taps:
            for own_call, moment in moments:
                with self._guard.raised():
                    if _is_its_turn(running, tap.instrument, moment):
                        tap.instrument.at_attention(own_call, moment)


def in_backward() -> bool:
    return _backward_task() != -1


def _is_its_turn(running: RunningCall, instrument: Instrument, context: Context) -> bool:
    """Whether the instrument wants to act now.

    Raises UnknownConditionError where it acts by conditions and they cannot be told.
    """
    if UNKNOWN in context.condition and instrument.conditions() is not None:
        raise UnknownConditionError(
            f"which of the {context.batch} batch entries at {context.hookpoint} are conditional cannot be told, and "
            f"{type(instrument).__name__} acts on some of them: {HOW_TO_STATE}"
        )
    active = instrument.active(context)
    running.asked[id(instrument)] = running.asked.get(id(instrument), False) or active
    if active:
        running.conditions_seen.setdefault(id(instrument), set()).update(context.condition)
    return active


def _handed_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> bool:
    """Whether something in the place of the module's forward gave back the very tensors that it was given."""
    if "forward" not in vars(module):
        return False
    given = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)}
    elements = output if isinstance(output, (tuple, list)) else (output,)
    tensors = [element for element in elements if isinstance(element, torch.Tensor)]
    return bool(tensors) and all(id(tensor) in given for tensor in tensors)


def _given(
    place: Place, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], run: RootRun
) -> torch.Tensor:
    """The place's stream in what the module was given."""
    target = place.target
    given = functools.partial(argument, module, args, kwargs)
    part = target.family.input_part(target.inner, place.stream, given, run.run)
    assert part is not None  # its output was of the stream
    return part.of(take_argument(module, part.name, args, kwargs))


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
