"""What attaching costs: the time a hookpoint's instruments take, over the time of the denoising step they run in."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline import Instrument, attach
from sparsefeat.pipeline.hookpoints import resolve


@dataclass(frozen=True)
class Overhead:
    """Seconds of every measured step: of the whole step, and of all that `attach` did at the hookpoint within it."""

    step_s: tuple[float, ...]
    hook_s: tuple[float, ...]

    @property
    def share_of_step(self) -> float:
        """Median over steps of hook time / step time, both of the same step."""
        return statistics.median(h / s for h, s in zip(self.hook_s, self.step_s, strict=True))


def measure_overhead(
    pipe: Any, path: str, instrument: Instrument, run: Callable[[], object], warm_up: int = 1
) -> Overhead:
    """Run `run()`, which calls the pipeline once, with the instrument attached, and time it at module `path`.

    Two hooks of our own, the first and the last on the module, stand around the session's, so that everything attaching
    does there counts: reshaping, encoding, editing, adding. A step lasts from one start of the denoiser to the next. The first `warm_up`
    steps are left out, and the last one (nothing marks its end). CUDA work is waited for at each mark.
    """
    module: nn.Module = resolve(pipe, path).module
    denoiser: nn.Module = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    starts: list[float] = []
    before: list[tuple[int, float]] = []
    spent: dict[int, float] = {}

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def mark_before(*_: Any) -> None:
        before.append((len(starts) - 1, now()))

    def mark_after(*_: Any) -> None:
        step, started = before.pop()
        spent[step] = spent.get(step, 0.0) + now() - started

    handles = [denoiser.register_forward_pre_hook(lambda *_: starts.append(now()), prepend=True)]
    try:
        with attach(pipe, instrument):
            # The session puts its hook first: ours must come after it, and go before it.
            handles.append(module.register_forward_hook(mark_before, prepend=True))
            handles.append(module.register_forward_hook(mark_after))
            run()
    finally:
        for handle in handles:
            handle.remove()
    steps = range(warm_up, len(starts) - 1)
    if not steps:
        raise ValueError(f"the run had {len(starts)} steps, of which {warm_up + 1} are left out: run more steps")
    return Overhead(
        step_s=tuple(starts[i + 1] - starts[i] for i in steps), hook_s=tuple(spent.get(i, 0.0) for i in steps)
    )
