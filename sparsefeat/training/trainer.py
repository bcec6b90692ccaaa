"""Train an SAE on rows of activations. A run can be stopped at any time and goes on where it was."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sparsefeat_kernels import release_gradient_memory
from torch import Tensor
from tqdm import tqdm

from sparsefeat.arguments import number, whole
from sparsefeat.sae import SAE
from sparsefeat.store import ShardReader
from sparsefeat.training.learner import Learner
from sparsefeat.training.losses import Batch
from sparsefeat.training.objectives import Objective
from sparsefeat.training.rows import RowSource, StoreRows, TensorRows, stream

CHECKPOINT, METRICS = "checkpoint.pt", "metrics.jsonl"
SAMPLE_ROWS = 32_768  # rows the start values are taken from, as sdxl-unbox does


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimiser steps, of `batch_size` rows each.

    lr: peak learning rate of Adam; None is 2e-4 / sqrt(n_latents / 2^14), the scaling of arXiv 2406.04093. It rises
        linearly over `warmup_steps` and falls linearly to 0 over the last `decay_steps` (None: all after the warm-up).
    betas: Adam's. grad_clip: largest norm of the whole gradient; None for no bound.
    objective: what is minimised, under which constraints, and which latents are dead; see `objectives`.
    seed: of the start values and of the order of the rows.
    checkpoint_every, log_every: in steps.
    """

    steps: int
    batch_size: int = 4096
    lr: float | None = None
    warmup_steps: int = 0
    decay_steps: int | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float | None = 1.0
    objective: Objective = field(default_factory=Objective)
    seed: int = 0
    checkpoint_every: int = 1000
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "checkpoint_every", "log_every"):
            whole(name, getattr(self, name))
        for name in ("lr", "grad_clip"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0, above=True)
        whole("warmup_steps", self.warmup_steps, 0, self.steps)
        if len(self.betas) != 2 or not all(0 <= number("betas", beta, 0, 1) < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas!r}: pass two numbers, from 0 to below 1")

    def lr_at(self, step: int, n_latents: int) -> float:
        peak = self.lr if self.lr is not None else 2e-4 / math.sqrt(n_latents / 2**14)
        decay = self.decay_steps if self.decay_steps is not None else self.steps - self.warmup_steps
        rise = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        fall = min(1.0, (self.steps - step) / decay) if decay else 1.0
        return peak * rise * fall


class SAETrainer:
    """Trains `sae` in place, in rows of unit spread; when `fit` is done it takes rows as they are. See `Learner`.

    rows: a tensor `[..., d_model]`, a `ShardReader` with a field "rows", or any `RowSource`.
    folder: where checkpoints and `metrics.jsonl` go; a checkpoint there is resumed from. None keeps nothing.

    >>> trainer = SAETrainer(SAE(SAEConfig(128, 1024, k=16)), activations, TrainConfig(steps=2000), folder="runs/mid")
    >>> sae = trainer.fit()                       # the same lines after an interruption go on from the checkpoint
    """

    def __init__(
        self, sae: SAE, rows: Tensor | ShardReader | RowSource, config: TrainConfig, folder: str | Path | None = None
    ) -> None:
        if isinstance(rows, Tensor):
            self.source: RowSource = TensorRows(rows)
        else:
            self.source = StoreRows(rows) if isinstance(rows, ShardReader) else rows
        if self.source.d_model != sae.d_model:
            raise ValueError(
                f"rows have width {self.source.d_model}, the SAE's d_model is {sae.d_model}: they must agree"
            )
        if self.source.n_rows < config.batch_size:
            raise ValueError(
                f"batch_size is {config.batch_size} but there are {self.source.n_rows} rows: make it smaller, "
                "or collect more"
            )
        self.sae, self.config = sae, config
        self.folder = None if folder is None else Path(folder)
        self.step = 0
        self.learner = Learner(sae, config.objective)
        self.log: list[dict[str, float]] = []
        # The epsilon is OpenAI's trainer's.
        self.optimizer = torch.optim.Adam(self.learner.trained, lr=0.0, betas=config.betas, eps=6.25e-10, fused=True)
        if self.folder is not None and (self.folder / CHECKPOINT).is_file():
            self._resume(self.folder / CHECKPOINT)
        else:
            sample = next(self.source.batches(min(self.source.n_rows, SAMPLE_ROWS), seed=config.seed))
            self.learner.begin(sample, config.seed)

    def fit(self, progress: bool = True) -> SAE:
        """Train to the last step; the SAE, in evaluation mode. Ctrl-C ends the step in hand, saves and leaves."""
        config = self.config
        batches = stream(self.source, config.batch_size, config.seed, self.step)
        interval = 0.5 if sys.stderr.isatty() else 20  # seconds; a log file wants few lines
        bar = tqdm(
            total=config.steps, initial=self.step, disable=not progress, mininterval=interval, desc="SAE", unit="step"
        )
        started, first = time.perf_counter(), self.step
        self.sae.train()
        with bar, ExitStack() as ended, _deferred_interrupt() as interrupted:
            ended.callback(self._drop_gradients)
            while self.step < config.steps:
                batch = next(batches)
                due = (self.step + 1) % config.log_every == 0 or self.step + 1 == config.steps
                measured = self.train_step(batch, measure=due)
                bar.update()
                if measured is not None:
                    seconds = time.perf_counter() - started
                    measured["rows_per_second"] = (self.step - first) * config.batch_size / seconds
                    self._write_log(measured)
                    bar.set_postfix(fvu=f"{measured['fvu']:.4f}", dead=f"{measured['dead']:.1%}", refresh=False)
                if self.step % config.checkpoint_every == 0 or self.step == config.steps or interrupted.is_set():
                    self.checkpoint()
                if interrupted.is_set():
                    kept = "nothing was kept, pass folder=" if self.folder is None else "the same lines go on from here"
                    raise KeyboardInterrupt(f"stopped after step {self.step} of {config.steps}; {kept}")
        return self.learner.fold().eval()

    def _drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        release_gradient_memory()

    def train_step(self, batch: Batch | Tensor, measure: bool = False) -> dict[str, float] | None:
        """One optimiser step; its figures if `measure`, which waits for the device."""
        learner, config = self.learner, self.config
        dead = learner.dead()
        loss = learner.loss(batch, self.step)
        self.optimizer.zero_grad(set_to_none=True)
        for parameter, gradient in zip(learner.trained, learner.gradients(loss), strict=True):
            parameter.grad = gradient
        learner.project()
        largest = math.inf if config.grad_clip is None else config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(learner.trained, largest)
        lr = config.lr_at(self.step, self.sae.n_latents)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        l0 = learner.settle(loss, self.step)
        self.step += 1
        if not measure:
            return None
        self._check_finite()
        return {
            "step": self.step,
            "fvu": float(loss.fvu),
            **{name: float(part) for name, part in loss.parts.items()},
            "l0": float(l0),
            "dead": float(dead.float().mean()),
            "grad_norm": float(norm),
            "lr": lr,
        }

    def checkpoint(self) -> None:
        """Write everything `fit` needs to go on, whole or not at all."""
        self._check_finite()
        if self.folder is None:
            return
        state = {
            "step": self.step,
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "sae_config": self.sae.config.to_json(),
            "train_config": asdict(self.config),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f"{CHECKPOINT}.partial"
            with open(partial, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / CHECKPOINT)
        except OSError as error:
            raise OSError(
                f"cannot write a checkpoint into {self.folder} ({error.strerror}): choose another folder"
            ) from error

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.learner.trained):
            raise FloatingPointError(
                f"the weights have NaN or Inf after step {self.step}: look for them in the rows, or lower lr "
                f"({self.config.lr_at(self.step, self.sae.n_latents):g}); the checkpoint, if there is one, is unharmed"
            )

    def _resume(self, path: Path) -> None:
        try:
            state: dict[str, Any] = torch.load(path, map_location=self.sae.device, weights_only=True)
            kept = {name: state[name] for name in ("sae_config", "train_config", "step", "learner")}
        except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
            raise ValueError(
                f"{path} is not a checkpoint of this trainer ({error}): remove it to start anew"
            ) from error
        for name, now in (("sae_config", self.sae.config.to_json()), ("train_config", asdict(self.config))):
            free = ("checkpoint_every", "log_every")  # no weight depends on them
            differ = [key for key, value in now.items() if kept[name].get(key) != value and key not in free]
            changed = {key: (kept[name].get(key), now[key]) for key in differ}
            if changed:
                said = ", ".join(f"{key} {was!r} -> {value!r}" for key, (was, value) in changed.items())
                raise ValueError(f"{path} was written with another config ({said}): use that, or another folder")
        self.learner.load_state_dict(kept["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = int(kept["step"])
        log = path.parent / METRICS
        if log.is_file():
            self.log = [entry for entry in _readable(log.read_text(encoding="utf-8")) if entry["step"] <= self.step]
            log.write_text("".join(json.dumps(entry) + "\n" for entry in self.log), encoding="utf-8")

    def _write_log(self, entry: dict[str, float]) -> None:
        self.log.append(entry)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / METRICS, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


def _readable(text: str) -> Iterator[dict[str, float]]:
    for line in text.splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the line a killed run was writing


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Within, Ctrl-C sets the event and nothing else; a second one interrupts at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python delivers signals to the main thread alone
        return

    def note(number: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
