"""Which step it is, by the scheduler: how often `scheduler.step` was called, never how often the model ran.

A call of the pipeline may run the model once or twice a scheduler step (guidance in one batch or in two passes), and a
second-order scheduler (Heun, KDPM2) takes 2 n - 1 scheduler steps for n denoising steps, PNDM n + 1. `Schedule` maps
the scheduler's steps onto the n that the user asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

_ABSENT = object()


class Schedule:
    """The steps of one call of a pipeline. `open()` watches `pipe.scheduler.step`, `close()` puts it back.

    The wrapper is an attribute of the scheduler object that lives as long as the call: pipelines and users exchange
    the scheduler between calls.
    """

    def __init__(self, pipe: Any, completed: Callable[[], None], own_loop: bool = False):
        self._pipe = pipe
        self._own_loop = own_loop  # the denoising loop is the user's: `pipe.num_timesteps` is of an earlier call
        self._completed = completed
        self._scheduler: Any = None
        self._before: Any = _ABSENT
        self._wrapper: Any = None
        self.started = False
        self.done = 0
        """How often the scheduler has stepped in this call."""
        self.total: int | None = None
        """How often it is going to."""
        self.n_steps: int | None = None
        self.timesteps: Any = None
        """The scheduler's timesteps in this call, as it holds them."""
        self._n_scheduled = 0
        self._first = 0

    def open(self) -> None:
        scheduler = getattr(self._pipe, "scheduler", None)
        if scheduler is None or not hasattr(scheduler, "step"):
            return
        step = scheduler.step

        @functools.wraps(step)  # pipelines look at the signature of `scheduler.step` to see whether it takes `eta`
        def counted(*args: Any, **kwargs: Any) -> Any:
            if not self.started:  # no hookpoint lies in the denoiser
                self.start(kwargs.get("timestep", args[1] if len(args) > 1 else None))
            result = step(*args, **kwargs)
            if self._completes_a_step():
                self._completed()
            self.done += 1
            return result

        self._scheduler, self._wrapper = scheduler, counted
        self._before = vars(scheduler).get("step", _ABSENT)
        scheduler.step = counted

    def close(self) -> None:
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is None or vars(scheduler).get("step") is not self._wrapper:
            return
        if self._before is _ABSENT:
            del scheduler.step
        else:
            scheduler.step = self._before

    def start(self, timestep: Any) -> None:
        """The denoiser is about to run. The first time, the scheduler's timesteps are final."""
        if self._scheduler is not getattr(self._pipe, "scheduler", None):
            self.close()  # exchanged in the middle of the call, by a callback
            self.open()
        if self.started or self._scheduler is None:
            return
        self.started = True
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None or len(timesteps) == 0:
            return
        scheduled = len(timesteps)
        asked = getattr(self._scheduler, "num_inference_steps", None)
        if not isinstance(asked, int) or not 0 < asked <= scheduled:
            asked = math.ceil(scheduled / getattr(self._scheduler, "order", 1))
        # Image-to-image takes a part of the schedule.
        loop = None if self._own_loop else getattr(self._pipe, "num_timesteps", None)
        self.total = loop if isinstance(loop, int) and 0 < loop <= scheduled else scheduled
        self._n_scheduled = asked
        self.n_steps = max(1, round(self.total * asked / scheduled))
        first = 0 if self.total == scheduled else self._begin(timesteps, timestep)
        self._first = first * asked // scheduled
        self.timesteps = timesteps[first : first + self.total]

    @property
    def step(self) -> int | None:
        """The denoising step that is going on, 0 to n_steps - 1."""
        if self.total is None or self.n_steps is None:
            return None
        return min(self.done * self.n_steps // self.total, self.n_steps - 1)

    @property
    def fraction(self) -> float | None:
        """The part of the whole schedule that lies before this step."""
        return None if self.step is None else (self._first + self.step) / self._n_scheduled

    def _begin(self, timesteps: Any, timestep: Any) -> int:
        """Where the model's first timestep stands in the schedule. Flow models are given it on another scale (FLUX by a
        thousandth); the index that the pipeline then told the scheduler to begin at says it, or that image-to-image
        takes the end of the schedule.
        """
        position = _position(timesteps, timestep)
        if position is None:
            begin = getattr(self._scheduler, "begin_index", None)
            position = begin if isinstance(begin, int) else len(timesteps) - (self.total or 0)
        return position

    def _completes_a_step(self) -> bool:
        """Whether the next scheduler step, if any, belongs to another denoising step."""
        if self.total is None or self.n_steps is None or self.done >= self.total:
            return False
        after = (self.done + 1) * self.n_steps // self.total
        return after > self.done * self.n_steps // self.total


def _position(timesteps: Any, timestep: Any) -> int | None:
    """Which of the timesteps this is: one wait for the device, in calls that use only a part of them."""
    if timestep is None:
        return None
    first = timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep
    found = [index for index, t in enumerate(timesteps) if float(t) == float(first)]
    return found[0] if found else None
