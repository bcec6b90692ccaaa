"""Which step it is, by the scheduler: how often `scheduler.step` was called, never how often the model ran.

A call of a pipeline may run the model once or several times a scheduler step (guidance in one batch or in passes, a
refinement of the latent), and a second-order scheduler (Heun, KDPM2) takes 2 n - 1 scheduler steps for n denoising
steps, PNDM n + 1, or four for each of its first three with Runge-Kutta (`skip_prk_steps=False`). A `Loop` is one way
through one schedule, and maps the scheduler's steps onto the n that the user asked for. A call may have several: a prior
and a decoder with a scheduler each, segments of a video, images in turn. It begins with `scheduler.set_timesteps`, or when the model runs again after the last step.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch

from sparsefeat.pipeline.knowing.watching import Listener


class Loop:
    """One way through the schedule of one scheduler, and of the copies of it that the pipeline made for the loop."""

    def __init__(self, scheduler: Any, index: int = 0):
        self.scheduler = scheduler
        self.index = index
        """Which of the loops of this scheduler in the call it is."""
        self.started: bool = False
        self.done: int = 0
        """How many scheduler steps are behind it."""
        self.total: int | None = None
        """How many there are going to be."""
        self.n_steps: int | None = None
        self.timesteps: Any = None
        """The scheduler's timesteps in this loop, as it holds them."""
        self.heard: bool = False
        """Whether the scheduler was heard to step in it."""
        self.lost: bool = False
        """Nothing steps the scheduler, and the model ran at a timestep that is not among those of this loop."""
        self._n_scheduled = 0
        self._first = 0
        self._begun = 0  # where in the scheduler's timesteps the loop begins
        self._in_fours = 0  # how many of these are Runge-Kutta's
        self._ran_at: Any = None
        self._counts: dict[int, tuple[Any, int]] = {}  # by scheduler, which is held so that its id stays its own
        self._runs = -1

    @property
    def finished(self) -> bool:
        return self.total is not None and self.done >= self.total

    @property
    def step(self) -> int | None:
        """The denoising step that is going on, 0 to n_steps - 1."""
        if self.total is None or self.n_steps is None or self.lost:
            return None
        return min(self._step_at(self.done), self.n_steps - 1)

    def _step_at(self, done: int) -> int:
        """The denoising step, from the loop's first on, that is going on after so many of the scheduler's."""
        if self._in_fours:
            return self._after(self._begun + done) - self._after(self._begun)
        return done * (self.n_steps or 0) // (self.total or 1)

    def _after(self, scheduled: int) -> int:
        return min(scheduled, self._in_fours) // 4 + max(0, scheduled - self._in_fours)

    @property
    def fraction(self) -> float | None:
        """The part of the whole schedule that lies before this step."""
        return None if self.step is None else (self._first + self.step) / self._n_scheduled

    @property
    def timestep(self) -> Any:
        """The scheduler's own timestep now: a tensor of one element, or None."""
        if self.timesteps is None or len(self.timesteps) == 0:
            return None
        return self.timesteps[min(self.done, len(self.timesteps) - 1)]

    def start(self, timestep: Any, length: int | None, taken: Any) -> None:
        """The denoiser is about to run for the first time: the scheduler's timesteps are final.

        `timestep` is what it is given, `length` how many of the timesteps the pipeline says it takes, and `taken` those
        themselves, where the pipeline has a method that picks them.
        """
        self.started = True
        timesteps = getattr(self.scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return
        scheduled = len(timesteps)
        asked = getattr(self.scheduler, "num_inference_steps", None)
        if not isinstance(asked, int) or not 0 < asked <= scheduled:
            asked = math.ceil(scheduled / getattr(self.scheduler, "order", 1))
        if taken is not None and 0 < len(taken) <= scheduled:  # image-to-image takes the end of the schedule
            first = _offset(timesteps, taken)
            self.total = min(len(taken), length or len(taken))
        else:
            found = () if length is not None and length >= scheduled else _positions(timesteps, timestep)
            begin = getattr(self.scheduler, "begin_index", None)
            end = None if length is None else scheduled - length
            if found:  # several are equal in second-order schedules, and at the end of Karras's
                first = end if end in found else begin if begin in found else found[0]
            elif length is not None and length >= scheduled:
                first = 0
            else:  # flow models are given the timestep on another scale (FLUX by a thousandth)
                first = begin if isinstance(begin, int) else end or 0
            self.total = scheduled - first if length is None else length
        fours = getattr(self.scheduler, "prk_timesteps", None)
        fours = 0 if fours is None else len(fours)
        self._begun, self._in_fours = first, fours if fours // 4 + scheduled - fours == asked else 0
        self.n_steps = max(1, round(self.total * asked / scheduled))
        if self._in_fours:
            self.n_steps = max(1, self._after(first + self.total) - self._after(first))
        self._n_scheduled = max(asked, self.n_steps)
        self._first = self._after(first) if self._in_fours else first * asked // scheduled
        self.timesteps = timesteps[first : first + self.total]

    def stepped(self, scheduler: Any, runs: int) -> bool:
        """The scheduler, or a copy of it, has stepped once, after `runs` runs of models; whether that completed a
        denoising step. Those that step one after the other without a run of a model between (a copy a frame, LTX-2's for the
        sound beside the one for the video) have made one step together.
        """
        before = self.done
        count = self._counts.get(id(scheduler), (scheduler, 0))[1] + 1
        self._counts[id(scheduler)] = scheduler, count
        if runs != self._runs or count > self.done:
            self.done += 1
        self._runs = runs
        self.heard = True
        return self._completes(before)

    def follow(self, timestep: Any) -> bool:
        """The model runs at `timestep`, in a loop whose scheduler was not heard to step (a sampler of the user's own): the
        place is that of the timestep. Whether a denoising step was completed by that. Waits for the device once for
        each new timestep.
        """
        before, ran_at, self._ran_at = self.done, self._ran_at, timestep
        if ran_at is None or timestep is None or _is_same(ran_at, timestep):
            return False
        places = _positions(self.timesteps, timestep)
        self.lost = self.lost or not places
        self.done = next((place for place in places if place >= before), places[0]) if places else before
        return self._completes(before)

    def _completes(self, before: int) -> bool:
        if self.total is None or self.n_steps is None or before >= self.total or self.done <= before:
            return False
        return self._step_at(self.done) > self._step_at(before)


class Steps:
    """The loops of one call of a pipeline. `completed(loop)` is called at the end of each denoising step, while
    `loop.step` is still that step. `stepping(loop, sample)` is called when the scheduler is about to step from a latent,
    and says what it is to step from.
    """

    def __init__(
        self,
        pipe: Any,
        completed: Callable[[Loop], None],
        stepping: Callable[[Loop, torch.Tensor], torch.Tensor],
        deaf: Callable[[], bool],
        own_loop: bool = False,
    ):
        self._pipe = pipe
        self._own_loop = own_loop  # the denoising loop is the user's: `pipe.num_timesteps` is of an earlier call
        self._completed = completed
        self._stepping = stepping
        heard = {"step": self._stepped, "set_timesteps": self._set}
        self._listener = Listener(heard, deaf, before={"step": self._about_to_step})
        self._loops: dict[int, Loop] = {}  # by scheduler, the one that is going on
        self._latest: Loop | None = None  # the one that was set last, or that a model ran in
        self._of: dict[str, Loop] = {}  # by component
        self._taken: Any = None
        self._runs = 0

    def open(self) -> None:
        self._listener.open()
        for scheduler in self._schedulers().values():
            self._listener.listen(scheduler)

    def close(self) -> None:
        self._listener.close()

    def takes(self, timesteps: Any) -> None:
        """The pipeline picked these timesteps of the scheduler's for its loop."""
        self._taken = timesteps

    def begin_run(self, component: str, timestep: Any) -> Loop | None:
        """A denoiser is about to run: the loop it runs in."""
        self._runs += 1
        schedulers = self._schedulers()
        for scheduler in schedulers.values():
            self._listener.listen(scheduler)  # exchanged in the middle of the call, by a callback
        loop = self._choose(component, schedulers)
        if loop is None:
            return None
        if loop.finished:
            loop = self._begin(loop.scheduler)
        self._of[component] = self._latest = loop
        if not loop.started:
            self._start(loop, timestep)
        if self._own_loop and not loop.heard and loop.total is not None:
            self._moved(loop, loop.follow, timestep)
        return loop

    def _choose(self, component: str, schedulers: dict[str, Any]) -> Loop | None:
        """The loop of the scheduler that is called after the component, else the one it is in the middle of, else the
        one that was set last, else that of `pipe.scheduler`.
        """
        if f"{component}_scheduler" in schedulers:
            return self._loop(schedulers[f"{component}_scheduler"])
        for loop in (self._of.get(component), self._latest):
            if loop is None or loop.finished or self._loops.get(id(loop.scheduler)) is not loop:
                continue
            if self._is_the_pipelines(loop.scheduler):
                return loop
        main = schedulers.get("scheduler", next(iter(schedulers.values()), None))  # one may have no length
        return None if main is None else self._loop(main)

    def _loop(self, scheduler: Any) -> Loop:
        """The loop that this scheduler is in: a new one, or that of the scheduler whose place it took in the middle."""
        if id(scheduler) not in self._loops:
            latest = self._latest
            if latest is None or latest.finished or self._is_the_pipelines(latest.scheduler):
                return self._begin(scheduler)
            latest.scheduler = scheduler
            self._loops[id(scheduler)] = latest
        return self._loops[id(scheduler)]

    def _begin(self, scheduler: Any) -> Loop:
        before = self._loops.get(id(scheduler))
        index = 0 if before is None else before.index + (before.done > 0)
        loop = self._loops[id(scheduler)] = Loop(scheduler, index)
        return loop

    def _start(self, loop: Loop, timestep: Any) -> None:
        length, taken, self._taken = None, self._taken, None
        if not self._own_loop and loop.scheduler is getattr(self._pipe, "scheduler", None):
            said = getattr(self._pipe, "num_timesteps", None)
            length = said if isinstance(said, int) and said > 0 else None
        loop.start(timestep, length, taken)

    def _is_the_pipelines(self, scheduler: Any) -> bool:
        return any(scheduler is own for own in self._schedulers().values())

    def _set(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        if not self._is_the_pipelines(scheduler):
            return
        known = id(scheduler) in self._loops
        self._latest = self._begin(scheduler) if known else self._loop(scheduler)
        self._taken = None

    def _loop_of(self, scheduler: Any) -> Loop | None:
        """The loop that a scheduler steps in, of the pipeline's or a copy of it made in the call."""
        return self._loop(scheduler) if self._is_the_pipelines(scheduler) else self._latest

    def _about_to_step(
        self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        loop = self._loop_of(scheduler)
        names = list(inspect.signature(type(scheduler).step).parameters)[1:]
        place = names.index("sample") if "sample" in names else len(args)
        sample = kwargs.get("sample", args[place] if place < len(args) else None)
        if loop is None or not loop.started or not isinstance(sample, torch.Tensor):
            return args, kwargs
        other = self._stepping(loop, sample)
        if other is sample:
            return args, kwargs
        if "sample" in kwargs:
            return args, {**kwargs, "sample": other}
        return (*args[:place], other, *args[place + 1 :]), kwargs

    def _stepped(self, scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        loop = self._loop_of(scheduler)
        if loop is None:
            return
        if not loop.started:  # no hookpoint lies in the denoiser
            self._start(loop, kwargs.get("timestep", args[1] if len(args) > 1 else None))
        self._moved(loop, loop.stepped, scheduler, self._runs)

    def _moved(self, loop: Loop, move: Callable[..., bool], *arguments: Any) -> None:
        done = loop.done
        if move(*arguments):
            after, loop.done = loop.done, done
            try:
                self._completed(loop)
            finally:
                loop.done = after

    def _schedulers(self) -> dict[str, Any]:
        """The schedulers of the pipeline by name, as they are now."""
        found = getattr(self._pipe, "__dict__", {})
        return {name: part for name, part in found.items() if is_scheduler(part)}


def _is_same(a: Any, b: Any) -> bool:
    """Whether two timesteps are the same thing, or hold the same value."""
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    if a is b or (tensors and a.data_ptr() == b.data_ptr() and a.numel()):
        return True
    first, second = (t.flatten()[0] if isinstance(t, torch.Tensor) else t for t in (a, b))
    return bool(first == second)


def is_scheduler(thing: Any) -> bool:
    return hasattr(type(thing), "set_timesteps") and hasattr(type(thing), "step")


def _offset(timesteps: Any, taken: Any) -> int:
    """Where in the timesteps a part of them begins: a view says it by its memory, anything else is their end."""
    if isinstance(timesteps, torch.Tensor) and isinstance(taken, torch.Tensor):
        same = taken.untyped_storage().data_ptr() == timesteps.untyped_storage().data_ptr()
        if same and taken.stride() == timesteps.stride() and taken.stride()[0]:
            offset = (taken.storage_offset() - timesteps.storage_offset()) // taken.stride()[0]
            if 0 <= offset <= len(timesteps) - len(taken):
                return offset
    return len(timesteps) - len(taken)


def _positions(timesteps: Any, timestep: Any) -> tuple[int, ...]:
    """Which of the timesteps this is: one wait for the device, in loops whose beginning nothing else says."""
    if timestep is None:
        return ()
    first = timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep
    schedule = torch.as_tensor(timesteps)
    if isinstance(first, torch.Tensor):
        schedule = schedule.to(first)
    return tuple(place for place, same in enumerate((schedule == first).tolist()) if same)
