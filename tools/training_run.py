"""A training run that can be stopped at any time and goes on where it was.

State is written whole to a temporary file and renamed into place, so a killed run loses at most the steps since the
last checkpoint. Ctrl-C and SIGTERM end the step in hand, write a checkpoint and leave with exit code 130.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm


def save_atomically(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)


class TrainingRun:
    """Counts steps, checkpoints every `every_s` seconds, resumes. `parts` maps names to objects with state_dict()."""

    def __init__(self, path: Path, n_steps: int, parts: dict, every_s: float = 60.0) -> None:
        self.path, self.n_steps, self.parts, self.every_s = path, n_steps, parts, every_s
        self.step = 0
        self.stopped = False
        if path.is_file():
            state = torch.load(path, weights_only=True)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
            self.step = state["step"]
            torch.set_rng_state(state["rng"])
            print(f"resumed {path.name} at step {self.step} of {n_steps}", flush=True)

    def checkpoint(self) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_atomically(self.path, {"step": self.step, "parts": parts, "rng": torch.get_rng_state()})

    def _stop(self, *_: object) -> None:
        self.stopped = True

    def steps(self, on_checkpoint: Callable[[], None] | None = None) -> Iterator[tuple[int, tqdm]]:
        """Yield `(step, progress bar)` for every step still to do."""
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        saved = time.monotonic()
        interactive = sys.stderr.isatty()
        total = None if self.n_steps >= 10**9 else self.n_steps  # where the time ends the run, not the steps
        bar = tqdm(initial=self.step, total=total, mininterval=0.5 if interactive else 20, desc=self.path.stem)
        try:
            while self.step < self.n_steps:
                yield self.step, bar
                self.step += 1
                bar.update()
                due = time.monotonic() - saved > self.every_s
                if due or self.stopped or self.step == self.n_steps:
                    self.checkpoint()
                    if on_checkpoint is not None:
                        on_checkpoint()
                    saved = time.monotonic()
                if self.stopped:
                    print(f"stopped at step {self.step}; the same command goes on from here", file=sys.stderr)
                    raise SystemExit(130)
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)


class Averaged:
    """Exponential moving average of a module's parameters and buffers, with the usual warm-up of the decay."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.module, self.decay, self.n = module, decay, 0
        self.shadow = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        self.n += 1
        decay = min(self.decay, (1 + self.n) / (10 + self.n))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.shadow[name].lerp_(value, 1 - decay)
            else:
                self.shadow[name].copy_(value)

    def state_dict(self) -> dict[str, object]:
        return {"n": self.n, "shadow": self.shadow}

    def load_state_dict(self, state: dict) -> None:
        self.n = state["n"]
        self.shadow = {name: value.clone() for name, value in state["shadow"].items()}


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
