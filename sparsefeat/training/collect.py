"""Collect a pipeline's activations to train on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.pipeline import Activations, Call, Context, Hookpoint, Instrument
from sparsefeat.store import Field, ShardReader, ShardWriter


@dataclass(frozen=True)
class CollectedRows:
    """rows `[n, d_model]`, and for each, `[n]`: the image it is of, numbered over all calls of this worker; its
    denoising step, -1 outside the steps, as in text encoders; its position in the grid."""

    rows: Tensor
    image: Tensor
    step: Tensor
    position: Tensor

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.rows, self.image, self.step, self.position))


class CollectActivations(Instrument):
    """Keeps activation rows at `hookpoints`, at all steps, in memory or in a store for each hookpoint.

    rows_per_image: so many positions of every image at every step, drawn by `seed`, the image's number and the step,
        so that neither batch size nor interruption changes the draw; None keeps all.
    condition: whose rows under guidance; None keeps those of every condition.
    dtype: what rows are kept in. folder: stores go to `folder/<path>-<io>-<stream>`; None keeps them in memory, up to
        `max_bytes`. worker: this process's id among several that write the same stores.

    What a call gave is kept when the call is complete, and a store is flushed a shard at a time: after a kill, make the
    same collector again and go on from prompt `images_done`. `close` (or the `with` block) writes the last shard.

    >>> with CollectActivations("unet.mid_block.attentions.0", rows_per_image=64, folder="acts") as collect:
    ...     with sf.attach(pipe, collect):
    ...         for prompt in prompts[collect.images_done:]:
    ...             pipe(prompt)
    >>> SAETrainer(SAE(config), collect.reader(), TrainConfig(steps=10_000)).fit()
    """

    def __init__(
        self,
        *hookpoints: Hookpoint | str,
        rows_per_image: int | None = None,
        condition: str | None = "cond",
        seed: int = 0,
        dtype: torch.dtype = torch.float16,
        folder: str | Path | None = None,
        worker: int = 0,
        shard_rows: int = 65_536,
        max_bytes: int = 2**31,
    ) -> None:
        if not hookpoints:
            raise ValueError("hookpoints is empty: name at least one, such as 'unet.mid_block.attentions.0'")
        if rows_per_image is not None and rows_per_image < 1:
            raise ValueError(f"rows_per_image is {rows_per_image}: pass at least 1, or None to keep every position")
        if not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}: choose a floating dtype, such as torch.float16")
        self._hookpoints = tuple(h if isinstance(h, Hookpoint) else Hookpoint.parse(h) for h in hookpoints)
        self.rows_per_image, self.condition, self.seed, self.dtype = rows_per_image, condition, seed, dtype
        self.folder = None if folder is None else Path(folder)
        self.worker, self.shard_rows, self.max_bytes = worker, shard_rows, max_bytes
        self._writers: dict[Hookpoint, ShardWriter] = {}
        self._kept: dict[Hookpoint, list[CollectedRows]] = {hookpoint: [] for hookpoint in self._hookpoints}
        self._call: dict[Hookpoint, list[CollectedRows]] = {}
        self._bytes = 0
        for hookpoint in self._hookpoints:
            if self.folder is not None and any(self._place(hookpoint).glob(f"w{worker:04d}-*.safetensors")):
                d_model = ShardReader(self._place(hookpoint)).schema["rows"].shape[0]
                self._writers[hookpoint] = self._open(hookpoint, d_model)
        # A kill may fall between two hookpoints' shards: go on from the one that has least.
        self.images_done = min((self._mark(hookpoint) for hookpoint in self._hookpoints), default=0)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self._hookpoints

    def begin_call(self, call: Call) -> None:
        self._call = {hookpoint: [] for hookpoint in self._hookpoints}  # what an interrupted call left is dropped
        self._bytes = sum(part.nbytes for parts in self._kept.values() for part in parts)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        if context.recomputing or context.hookpoint is None:
            return
        hookpoint, step = context.hookpoint, -1 if context.step is None else context.step
        rows = activations.rows.detach().reshape(context.batch, context.positions, -1)
        for entry, (condition, index) in enumerate(zip(context.condition, context.prompt_index, strict=True)):
            image = self.images_done + index
            if (self.condition is not None and condition != self.condition) or image < self._mark(hookpoint):
                continue
            position = self._positions(context.positions, image, step, hookpoint)
            kept = rows[entry, position.to(rows.device)].to("cpu", self.dtype)
            whose = torch.full_like(position, image), torch.full_like(position, step)
            part = CollectedRows(kept, *whose, position)
            self._call[hookpoint].append(part)
            self._bytes += part.nbytes if self.folder is None else 0
        if self._bytes > self.max_bytes:
            raise MemoryError(
                f"the collected rows take {self._bytes:,} bytes, more than max_bytes {self.max_bytes:,}: "
                "pass folder= to keep them on disk, or fewer rows_per_image"
            )

    def end_call(self, call: Call) -> dict[Hookpoint, CollectedRows]:
        """Keep the call's rows; they are also the recording."""
        seen = [int(part.image.max()) + 1 for parts in self._call.values() for part in parts if len(part.image)]
        done = self.images_done + call.n_images if call.n_images else max(seen, default=self.images_done)
        recording = {hookpoint: _joined(parts) for hookpoint, parts in self._call.items() if parts}
        for hookpoint, part in recording.items():
            if not part.rows.isfinite().all():
                raise OverflowError(
                    f"activations at {hookpoint} have NaN or Inf as {self.dtype}: pass dtype=torch.float32; if that "
                    "does not help, the pipeline makes them"
                )
        for hookpoint, part in recording.items():
            if self.folder is None:
                self._kept[hookpoint].append(part)
                continue
            if hookpoint not in self._writers:
                self._writers[hookpoint] = self._open(hookpoint, part.rows.shape[1])
            fields = {"rows": part.rows, "image": part.image, "step": part.step, "position": part.position}
            self._writers[hookpoint].append(fields, mark=done)
        self.images_done, self._call = done, {}
        return recording

    def collected(self, hookpoint: Hookpoint | str | None = None) -> CollectedRows:
        """What is in memory for a hookpoint (which may be left out if there is one), over all calls."""
        chosen = self._choose(hookpoint)
        if self.folder is not None:
            raise ValueError(f"the rows are in a store at {self._place(chosen)}: use reader()")
        if not self._kept[chosen]:
            raise ValueError(f"nothing was collected at {chosen}: attach this instrument and call the pipeline first")
        self._kept[chosen] = [_joined(self._kept[chosen])]
        return self._kept[chosen][0]

    def reader(self, hookpoint: Hookpoint | str | None = None) -> ShardReader:
        """A reader of what is on disk for a hookpoint, without the shard in hand: `close` first to have all."""
        chosen = self._choose(hookpoint)
        if self.folder is None:
            raise ValueError("the rows are in memory: use collected(), or pass folder= for a store")
        return ShardReader(self._place(chosen))

    def close(self) -> None:
        """Write what is buffered. Without a store this does nothing."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> CollectActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self, n: int, image: int, step: int, hookpoint: Hookpoint) -> Tensor:
        if self.rows_per_image is None or self.rows_per_image >= n:
            return torch.arange(n)
        # One number for who asks: crc32 mixes well enough, and is the same in every process, unlike hash().
        asked = zlib.crc32(f"{self.seed}/{image}/{step}/{hookpoint!r}".encode())
        return torch.randperm(n, generator=torch.Generator().manual_seed(asked))[: self.rows_per_image].sort().values

    def _choose(self, hookpoint: Hookpoint | str | None) -> Hookpoint:
        if hookpoint is None and len(self._hookpoints) == 1:
            return self._hookpoints[0]
        chosen = Hookpoint.parse(hookpoint) if isinstance(hookpoint, str) else hookpoint
        if chosen not in self._hookpoints:
            raise ValueError(f"hookpoint is {hookpoint}: choose one of {[str(h) for h in self._hookpoints]}")
        return chosen

    def _place(self, hookpoint: Hookpoint) -> Path:
        assert self.folder is not None
        rows = "" if hookpoint.rows is None else "-" + str(hookpoint).rpartition(":")[2]
        return self.folder / f"{hookpoint.path}-{hookpoint.io}-{hookpoint.stream}{rows}"

    def _open(self, hookpoint: Hookpoint, d_model: int) -> ShardWriter:
        number = Field(torch.int64)
        fields = {"rows": Field(self.dtype, (d_model,)), "image": number, "step": number, "position": number}
        metadata: dict[str, Any] = {
            "hookpoint": str(hookpoint),
            "condition": self.condition,
            "rows_per_image": self.rows_per_image,
            "seed": self.seed,
        }
        return ShardWriter(
            self._place(hookpoint), fields, metadata=metadata, worker=self.worker, shard_rows=self.shard_rows
        )

    def _mark(self, hookpoint: Hookpoint) -> int:
        """How many images are on disk for the hookpoint."""
        writer = self._writers.get(hookpoint)
        return int(writer.mark or 0) if writer is not None else 0


def _joined(parts: list[CollectedRows]) -> CollectedRows:
    names = ("rows", "image", "step", "position")
    return CollectedRows(*(torch.cat([getattr(part, name) for part in parts]) for name in names))
