"""Train SAEs on rows of activations. A run can be stopped or killed at any time and goes on where it was."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from sparsefeat_kernels import release_gradient_memory
from torch import Tensor, nn
from tqdm import tqdm

from sparsefeat.arguments import on_the_cpu_by_default
from sparsefeat.frozen import Frozen
from sparsefeat.sae import SAE
from sparsefeat.store import ShardReader
from sparsefeat.training.activations.rows import RowSource, SideBySide, Source, StoreRows, TensorRows
from sparsefeat.training.learning.dictionaries import remake
from sparsefeat.training.learning.learner import Learner
from sparsefeat.training.objective.losses import Batch
from sparsefeat.training.ranks import ALONE, Ranks
from sparsefeat.training.run.checkpoint import newest_checkpoint, read_description, read_tensors, write_checkpoint
from sparsefeat.training.run.config import TrainConfig
from sparsefeat.training.run.early import EarlyWarnings, misfit
from sparsefeat.training.run.metrics import Metrics
from sparsefeat.whole import Ended, place_to_fill

SAMPLE_ROWS = 32_768  # rows the start values are taken from, as sdxl-unbox does
# Ranks agree on whether one of them was interrupted at these steps: asking waits for the device.
AGREE_EVERY = 10
FREE = ("checkpoint_every", "log_every")  # settings that no weight depends on


class SAETrainer(Frozen):
    """Trains `sae`, a new one, in place, in rows of unit spread; when `fit` is done it takes rows as they are. See `Learner`.

    rows: a tensor `[..., d_model]`, a `ShardReader` with a field "rows", any `RowSource`; or a `Source` of several places,
        whose number `place` this SAE is of.
    folder: where checkpoints, `metrics.jsonl` and `metrics.csv` go; a checkpoint there is resumed from. None keeps nothing.
    ranks: the processes that share every batch, each of which makes the same trainer; see `Ranks`. The losses are those of
        one process to fp32 rounding, and a run may go on with another number of ranks.

    >>> trainer = SAETrainer(SAE(SAEConfig(128, 1024, k=16)), activations, TrainConfig(steps=2000), folder="runs/mid")
    >>> sae = trainer.fit()                       # the same lines after an interruption go on from the checkpoint

    Raises:
        TypeError: an argument of another kind.
        ValueError: rows of another width than the SAE's; a checkpoint of another config.
        RuntimeError: torch's default device is not the CPU. OSError: the folder cannot be written.
    """

    def __init__(
        self,
        sae: SAE,
        rows: Tensor | ShardReader | RowSource | Source,
        config: TrainConfig,
        folder: str | Path | None = None,
        *,
        place: int = 0,
        ranks: Ranks = ALONE,
        tensorboard: bool = False,
    ) -> None:
        if not isinstance(sae, SAE):
            raise TypeError(f"sae is {type(sae).__name__}, not an SAE; make one, sparsefeat.SAE(config).")
        if not isinstance(config, TrainConfig):
            raise TypeError(
                f"config is {type(config).__name__}, not a TrainConfig; make one, TrainConfig(steps=10_000)."
            )
        on_the_cpu_by_default()
        self.source: Source = as_source(rows)
        self.place: int = place
        self.ranks: Ranks = ranks
        self.source.check(config.batch_size)
        self.sae: SAE = sae
        self.config: TrainConfig = config
        self.folder: Path | None = None if folder is None else place_to_fill(folder)
        self._step = 0
        self._saved = -1
        self.learner: Learner = Learner(sae, config.objective, ranks)
        if config.precision != "float32" and config.objective.decoder != "unit":
            raise ValueError(
                f"precision={config.precision!r} is for a decoder of unit rows: train this one in float32."
            )
        self.optimizer: torch.optim.Optimizer = config.make_optimizer(self.learner.trained)
        self.metrics: Metrics = Metrics(self.folder if ranks.first else None, tensorboard)
        checkpoint = newest_checkpoint(self.folder)
        self._early = EarlyWarnings(str(sae.config.hookpoint or "the SAE"))
        if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in sae.parameters()):
            raise ValueError("sae cannot be trained under torch.inference_mode: make it, and train it, outside")
        if checkpoint is None:
            _check_new(sae)
            self._begin()
        self.averaged: dict[str, Tensor] = {}
        if config.ema is not None:
            self.averaged = {
                name: p.detach().clone() for name, p in zip(self.learner.names, self.learner.trained, strict=True)
            }
        if checkpoint is not None:
            self._resume(checkpoint)

    @property
    def step(self) -> int:
        """How many were done."""
        return self._step

    @property
    def log(self) -> list[dict[str, float]]:
        """What was measured, an entry a step that was."""
        return self.metrics.entries

    def fit(self, progress: bool = True) -> SAE:
        """Train to the last step; the SAE, in evaluation mode. Ctrl-C and SIGTERM end the step in hand, save and leave.

        Raises:
            FloatingPointError: the weights have NaN or Inf. OSError: a checkpoint cannot be written.
        """
        return fit_together([self], progress)[0]

    def train_step(self, batch: Batch | Tensor, measure: bool = False) -> dict[str, float] | None:
        """One optimiser step on this rank's part of a batch; its figures if `measure`, which waits for the device.

        Raises:
            FloatingPointError: the weights have NaN or Inf.
        """
        learner, config = self.learner, self.config
        dead = learner.dead()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for piece in _pieces(batch, config.accumulate):
            with torch.enable_grad(), _in_precision(self.sae, config.precision):
                loss = learner.loss(piece, self.step)
                gradients = learner.gradients(loss)
            for parameter, gradient in zip(learner.trained, gradients, strict=True):
                gradient = gradient.to(parameter.dtype)
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            losses.append(loss)
        for parameter in learner.trained:
            assert parameter.grad is not None
            self.ranks.sum(parameter.grad)
            if len(losses) > 1:
                parameter.grad /= len(losses)
        learner.project()
        norm = None
        if config.grad_clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(learner.trained, config.grad_clip)
        elif measure:
            norm = torch.nn.utils.get_total_norm([p.grad for p in learner.trained if p.grad is not None])
        lr = config.lr_at(self.step, self.sae.n_latents)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        active = [learner.settle(loss, self.step) for loss in losses]
        for name, parameter in zip(learner.names, learner.trained, strict=True) if self.averaged else ():
            self.averaged[name].lerp_(parameter.detach(), 1 - (config.ema or 0))
        self._step += 1
        if norm is None or not measure:
            return None
        self._check_finite()
        measured = {
            "step": self.step,
            "fvu": _mean([loss.fvu for loss in losses]),
            **{name: _mean([loss.parts[name] for loss in losses]) for name in losses[0].parts},
            "l0": _mean(active),
            "dead": float(dead.float().mean()),
            "grad_norm": float(norm),
            "lr": lr,
        }
        if self.ranks.first:
            self._early.look(measured, learner.get_buffer("rows_since_fired"), config)
        return measured

    def checkpoint(self) -> None:
        """Write everything `fit` needs to go on, whole or not at all.

        Raises:
            FloatingPointError: the weights have NaN or Inf.
            OSError: it cannot be written.
        """
        self._check_finite()
        if self.folder is not None and self._saved != self.step:
            self._saved = self.step
            described = {
                "sae_config": self.sae.config.to_json(),
                "train_config": asdict(self.config),
                "rows": self._rows(),
            }
            write_checkpoint(self.folder, self.step, described, self._state(), self.ranks)

    def finish(self) -> SAE:
        """The SAE as it takes rows as they are, in evaluation mode."""
        learner = self.learner
        with torch.no_grad():
            for name, parameter in zip(learner.names, learner.trained, strict=True) if self.averaged else ():
                parameter.copy_(self.averaged[name])
            if self.averaged and learner.dictionary is not None:
                remake(learner.dictionary, self.sae)
        return learner.fold().eval()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        release_gradient_memory()

    def _begin(self) -> None:
        sae, config = self.sae, self.config
        # Of directions that are rows twice as many are looked at, in case that some are alike.
        wanted = max(SAMPLE_ROWS, 2 * sae.n_latents) if config.start == "rows" else SAMPLE_ROWS
        sample = self.source.sample(self.place, wanted, config.seed, self.ranks)
        if sample.rows.shape[-1] != sae.d_model:
            raise ValueError(
                f"rows have width {sample.rows.shape[-1]}, the SAE's d_model is {sae.d_model}: they must agree"
            )
        problem = misfit(sample.rows, sae.config) if self.ranks.first else None
        if problem is not None:
            warnings.warn(problem, stacklevel=3)
        self.learner.begin(sample, config.seed, config.start)
        self.ranks.share(tensor for tensor in self.learner.state_dict().values())

    def _state(self) -> dict[str, Tensor]:
        """Everything that changes while training, by name; before the first step the optimiser's is zero."""
        learner, optimizer = self.learner, self.optimizer
        state = {f"learner.{name}": tensor for name, tensor in learner.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.averaged.items()}
        for name, parameter in zip(learner.names, learner.trained, strict=True):
            if not optimizer.state[parameter]:
                moments = {moment: torch.zeros_like(parameter) for moment in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device, dtype=torch.float32),
                    **moments,
                }
            state |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[parameter].items()}
        return state

    def _check_finite(self) -> None:
        if not all(bool(parameter.isfinite().all()) for parameter in self.learner.trained):
            raise FloatingPointError(
                f"the weights have NaN or Inf after step {self.step}: look for them in the rows, or lower the learning rate, "
                f"which was {self.config.lr_at(self.step - 1, self.sae.n_latents):g}; the checkpoint, if there is one, is "
                "unharmed"
            )

    def _rows(self) -> dict[str, Any]:
        """What the rows are of, as a checkpoint keeps it."""
        rows: dict[str, Any] = json.loads(json.dumps(self.source.origin(self.place)))
        return rows

    def _resume(self, checkpoint: Path) -> None:
        kept = read_description(checkpoint)
        for name, now in (("sae_config", self.sae.config.to_json()), ("train_config", asdict(self.config))):
            changed = list(_differences(kept.get(name, {}), now))
            if changed:
                raise ValueError(
                    f"{checkpoint} was written with another config ({'; '.join(changed)}): use that, or another folder"
                )
        before, rows = kept.get("rows", {}), self._rows()
        other = next((name for name in sorted(before.keys() & rows.keys()) if before[name] != rows[name]), None)
        if other is not None:
            raise ValueError(
                f"{checkpoint} was trained on other rows ({other}={before[other]!r}, now {rows[other]!r}): use those, or "
                "another folder"
            )
        read_tensors(checkpoint, self._state(), self.ranks)
        self._step = self._saved = int(kept["step"])
        self.metrics.resume(self.step)


def fit_together(trainers: Sequence[SAETrainer], progress: bool = True) -> list[SAE]:
    """Train several SAEs from one source, whose batches they share: a pipeline that draws them runs once for all.

    Each has a folder and a checkpoint of its own; of a run that goes on, those that are ahead wait for the others.
    """
    first = trainers[0]
    for other in trainers[1:]:
        for name in ("source", "ranks"):
            if getattr(other, name) != getattr(first, name):
                raise ValueError(f"the trainers differ in {name}: make all with the same.")
        for name in ("batch_size", "seed"):
            if getattr(other.config, name) != getattr(first.config, name):
                raise ValueError(f"the trainers differ in {name}: give all the same.")
    if not all(parameter.requires_grad for trainer in trainers for parameter in trainer.learner.trained):
        raise ValueError("sae has weights that require no gradient: call sae.requires_grad_(True) before training")
    for trainer in trainers:
        moved = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
        if not all(id(parameter) in moved for parameter in trainer.learner.trained):
            raise ValueError(
                "sae has another Parameter in the place of one that it had when its trainer was made, which would not be "
                "trained: make the trainer afterwards, or write into the old one under torch.no_grad()"
            )
    ranks, batch_size = first.ranks, first.config.batch_size
    left = [trainer for trainer in trainers if trainer.step < trainer.config.steps]
    start, stop = min((t.step for t in left), default=0), max((t.config.steps for t in left), default=0)
    if not left and progress and ranks.first:
        done = ", ".join(
            f"{trainer.folder or 'this trainer'} has all {trainer.config.steps} steps" for trainer in trainers
        )
        print(f"{done}: nothing is trained; for other rows take another folder", file=sys.stderr)
    interval = 0.5 if sys.stderr.isatty() else 20  # seconds; a log file wants few lines
    bar = tqdm(
        total=stop,
        initial=start,
        disable=not (progress and ranks.first and left),
        mininterval=interval,
        desc="SAE" if len(trainers) == 1 else f"{len(trainers)} SAEs",
        unit="step",
    )
    began = time.perf_counter()
    with bar, ExitStack() as ended, _deferred_interrupt() as interrupted:
        for trainer in left:
            trainer.sae.train()
            ended.callback(trainer.drop_gradients)
            ended.callback(trainer.metrics.close)
        batches = first.source.stream(batch_size, first.config.seed, start, ranks) if left else iter(())
        for step in range(start, stop):
            at_hand = next(batches)
            for trainer in left:
                if trainer.step != step or step >= trainer.config.steps:
                    continue
                config, last = trainer.config, step + 1 == trainer.config.steps
                measured = trainer.train_step(at_hand[trainer.place], (step + 1) % config.log_every == 0 or last)
                if measured is not None:
                    measured["rows_per_second"] = (step + 1 - start) * batch_size / (time.perf_counter() - began)
                    trainer.metrics.add(measured)
                    bar.set_postfix(fvu=f"{measured['fvu']:.4f}", dead=f"{measured['dead']:.1%}", refresh=False)
                if (step + 1) % config.checkpoint_every == 0 or last:
                    trainer.checkpoint()
            bar.update()
            asked = ranks.world == 1 or (step + 1) % AGREE_EVERY == 0
            if asked and ranks.any(bool(interrupted), first.sae.device):
                _leave(left, step + 1, interrupted)
    return [trainer.finish() for trainer in trainers]


def _check_new(sae: SAE) -> None:
    """Training begins with start values of its own: weights that somebody has trained would be lost without a word."""
    if any(bool(bias.any()) for bias in (sae.b_enc, sae.b_pre, sae.b_out) if bias is not None):
        raise ValueError(
            "sae has weights already, and training would begin anew in their place: train a new one, "
            "sparsefeat.SAE(sae.config)"
        )


def as_source(rows: Tensor | ShardReader | RowSource | Source) -> Source:
    """What a trainer is given, as what it takes."""
    if isinstance(rows, Tensor):
        return SideBySide(TensorRows(rows))
    if isinstance(rows, ShardReader):
        return SideBySide(StoreRows(rows))
    if not hasattr(rows, "batches") and not hasattr(rows, "check"):
        raise TypeError(
            f"rows is {type(rows).__name__}, no activations: pass a tensor [rows, d_model], or what collect.reader() gives."
        )
    return SideBySide(cast(RowSource, rows)) if hasattr(rows, "batches") else cast(Source, rows)


def _leave(trainers: Sequence[SAETrainer], step: int, interrupted: Sequence[int]) -> None:
    """Save all and raise Ended, which says what was kept."""
    for trainer in trainers:
        trainer.checkpoint()
    kept = "nothing was kept, pass folder=" if trainers[0].folder is None else "the same lines go on from here"
    said = f"stopped after step {step} of {max(t.config.steps for t in trainers)}; {kept}"
    raise Ended(said, number=interrupted[0] if interrupted else signal.SIGTERM)


def _pieces(batch: Batch | Tensor, n: int) -> list[Batch]:
    """The batch in n parts, sizes equal but for one."""
    batch = batch if isinstance(batch, Batch) else Batch(batch)
    if n == 1:
        return [batch]
    parts = [[None] * n if tensor is None else list(tensor.tensor_split(n)) for tensor in batch]
    return [Batch(*part) for part in zip(*parts, strict=True)]


@contextmanager
def _in_precision(sae: SAE, precision: str) -> Iterator[None]:
    """Within, the SAE's tensors are copies of this precision, whose gradients are those of the tensors."""
    dtype = getattr(torch, precision)
    if sae.dtype == dtype or precision == "float32":
        yield
        return
    kept = dict(sae._parameters), dict(sae._buffers)
    try:
        for name, parameter in kept[0].items():
            if parameter is not None:
                sae._parameters[name] = nn.Parameter(parameter.detach().to(dtype), parameter.requires_grad)
        for name, buffer in kept[1].items():
            if buffer is not None and buffer.is_floating_point():
                sae._buffers[name] = buffer.to(dtype)
        yield
    finally:
        sae._parameters.update(kept[0])
        sae._buffers.update(kept[1])


def _mean(figures: Sequence[Tensor]) -> float:
    return sum(map(float, figures)) / len(figures)


def _differences(was: Any, now: Any) -> Iterator[str]:
    """Settings that differ, those within the objective too; lists in files are tuples in memory."""
    for name, value in now.items():
        if name in FREE:
            continue
        before = was.get(name)
        if isinstance(value, dict) and isinstance(before, dict) and name != "metadata":
            yield from _differences(before, value)
        elif before != (list(value) if isinstance(value, tuple) else value):
            yield f"{name}={before!r}, now {value!r}"


@contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Within, Ctrl-C and SIGTERM add their number to the list and do nothing else; a second one interrupts at once."""
    interrupted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python delivers signals to the main thread alone
        return

    def note(number: int, frame: Any) -> None:
        if interrupted:
            raise KeyboardInterrupt
        interrupted.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
