"""Collect a pipeline's activations to train on."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.disk import InUseError
from sparsefeat.pipeline import Activations, Call, Context, FrozenInstrument, Hookpoint
from sparsefeat.pipeline.context import CONDITIONS
from sparsefeat.store import Field, ShardReader, ShardWriter, check_metadata
from sparsefeat.whole import place_to_fill

WANTED: dict[str, tuple[str, ...]] = {"cond": ("cond",), "uncond": ("uncond",), "both": ("cond", "uncond")}
"""What `condition` may say, and the conditions of the rows that are kept."""


@dataclass(frozen=True)
class CollectedRows:
    """rows `[n, d_model]`, and for each, `[n]`: the image it is of, numbered over all calls; its denoising step, -1
    outside the steps, as in text encoders; its position in the grid; the timestep its model was given, NaN outside the
    steps; its condition, a place in `sparsefeat.pipeline.context.CONDITIONS`, -1 where it is unknown."""

    rows: Tensor
    image: Tensor
    step: Tensor
    position: Tensor
    timestep: Tensor
    condition: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def store_of(folder: Path, hookpoint: Hookpoint) -> Path:
    """Where the rows of a hookpoint lie among those of others."""
    rows = "" if hookpoint.rows is None else "-" + str(hookpoint).rpartition(":")[2]
    return folder / f"{hookpoint.path}-{hookpoint.io}-{hookpoint.stream}{rows}"


# What a row has in a store, beside the row itself.
LABELS = {
    "image": Field(torch.int64),
    "step": Field(torch.int64),
    "position": Field(torch.int64),
    "timestep": Field(torch.float32),
    "condition": Field(torch.int8),
}


@dataclass(frozen=True)
class _Seen:
    """What one run of a module gave, still where it was computed: `rows [entries, positions, d_model]`."""

    hookpoint: Hookpoint
    context: Context
    rows: Tensor
    entries: list[int]
    images: list[int]
    position: Tensor

    def collected(self) -> CollectedRows:
        """On the CPU; waits for the device."""
        context, (n, positions) = self.context, self.position.shape
        names = [context.entries[entry][0] for entry in self.entries]
        conditions = torch.tensor([CONDITIONS.index(c) if c in CONDITIONS else -1 for c in names], dtype=torch.int8)
        step = -1 if context.step is None else context.step
        timestep = torch.nan if context.timestep is None else context.timestep
        return CollectedRows(
            self.rows.cpu().flatten(0, 1),
            torch.tensor(self.images).repeat_interleave(positions),
            torch.full((n * positions,), step),
            self.position.flatten(),
            torch.full((n * positions,), timestep, dtype=torch.float32),
            conditions.repeat_interleave(positions),
        )


class CollectActivations(FrozenInstrument):
    """Keeps activation rows at `hookpoints`, at all steps, in memory or in a store for each hookpoint.

    rows_per_image: so many positions of every image at every step, other ones at each step until all had their turn;
        None keeps all. steps_per_image: so many steps of every image; None keeps all. Both are drawn by `seed` and the
        image's number, so that neither batch size nor interruption changes the draw.
    condition: whose rows under guidance: "cond", "uncond", "both" of these, or None, those of every condition and also
        those of which it cannot be told.
    dtype: what rows are kept in. folder: stores go to `folder/<path>-<io>-<stream>`; None keeps them in memory, up to
        `max_bytes`. worker: this process's id among several that write the same stores. first_image: the number of the
        first image. metadata: what else is the same for all rows of the stores.

    What a call gave is kept when the call is complete, and a store is flushed a shard at a time: after a kill, make the
    same collector again and go on from prompt `images_done`. `close` (or the `with` block) writes the last shard.

    >>> with CollectActivations("unet.mid_block.attentions.0", rows_per_image=64, folder="acts") as collect:
    ...     with sf.attach(pipe, collect):
    ...         for prompt in prompts[collect.images_done:]:
    ...             pipe(prompt)
    >>> SAETrainer(SAE(config), collect.reader(), TrainConfig(steps=10_000)).fit()

    Raises:
        ValueError: an argument that cannot be, by its name; a store there that holds other rows.
        OSError: the folder is a file, or cannot be written.
    """

    def __init__(
        self,
        *hookpoints: Hookpoint | str,
        rows_per_image: int | None = None,
        steps_per_image: int | None = None,
        condition: str | None = "cond",
        seed: int = 0,
        dtype: torch.dtype = torch.float16,
        folder: str | Path | None = None,
        worker: int = 0,
        first_image: int = 0,
        metadata: Mapping[str, Any] | None = None,
        shard_rows: int = 65_536,
        max_bytes: int = 2**31,
    ) -> None:
        if not hookpoints:
            raise ValueError("hookpoints is empty: name at least one, such as 'unet.mid_block.attentions.0'")
        for name, given in (("rows_per_image", rows_per_image), ("steps_per_image", steps_per_image)):
            if given is not None:
                whole(name, given)
        for name, given, low in (
            ("seed", seed, 0), ("worker", worker, 0), ("first_image", first_image, 0),
            ("shard_rows", shard_rows, 1), ("max_bytes", max_bytes, 1),
        ):  # fmt: skip
            whole(name, given, low)
        if condition not in (*WANTED, None):
            raise ValueError(f"condition is {condition!r}: choose one of {', '.join(WANTED)}, or None for all rows")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"dtype is {dtype!r}: choose a floating dtype, such as torch.float16")
        self._hookpoints = tuple(h if isinstance(h, Hookpoint) else Hookpoint.parse(h) for h in hookpoints)
        twice = [str(h) for h in self._hookpoints if self._hookpoints.count(h) > 1]
        if twice:
            raise ValueError(f"hookpoints has {twice[0]!r} twice: name each once")
        self.rows_per_image: int | None = rows_per_image
        self.steps_per_image: int | None = steps_per_image
        self.condition: str | None = condition
        self.seed: int = seed
        self.dtype: torch.dtype = dtype
        self.folder: Path | None = None if folder is None else place_to_fill(folder)
        self.worker: int = worker
        self.shard_rows: int = shard_rows
        self.max_bytes: int = max_bytes
        self.metadata: dict[str, Any] = dict(metadata or {})
        self._writers: dict[Hookpoint, ShardWriter] = {}
        self._kept: dict[Hookpoint, list[CollectedRows]] = {hookpoint: [] for hookpoint in self._hookpoints}
        self._call: dict[Hookpoint, list[CollectedRows]] = {}
        self._seen: list[_Seen] = []
        self._orders: dict[tuple[str, int, int], Tensor] = {}
        self._bytes = 0
        self._first = first_image
        for hookpoint in self._hookpoints:
            if self.folder is None:
                continue
            store = store_of(self.folder, hookpoint)
            check_metadata(store, self._metadata(hookpoint))
            if any(store.glob(f"w{worker:04d}-*.safetensors")):
                d_model = ShardReader(store).schema["rows"].shape[0]
                self._writers[hookpoint] = self._open(hookpoint, d_model)
        # A kill may fall between two hookpoints' shards: go on from the one that has least.
        self._images_done = min(self._mark(hookpoint) for hookpoint in self._hookpoints)
        self._rows_kept = 0

    @property
    def images_done(self) -> int:
        """Of completed calls, those in the store among them: the number of the prompt to go on from."""
        return self._images_done

    @property
    def rows_kept(self) -> int:
        """Over all hookpoints, since this collector was made."""
        return self._rows_kept

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self._hookpoints

    def conditions(self) -> tuple[str, ...] | None:
        return None if self.condition is None else WANTED[self.condition]

    def begin_call(self, call: Call) -> None:
        self._call = {hookpoint: [] for hookpoint in self._hookpoints}  # what an interrupted call left is dropped
        self._seen, self._orders = [], {}
        self._bytes = sum(part.nbytes for parts in self._kept.values() for part in parts)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        if context.recomputing or context.hookpoint is None:
            return
        hookpoint, wanted, done = context.hookpoint, self.conditions(), self._mark(context.hookpoint)
        images = [self.images_done + index for _, index in context.entries]
        entries = [
            entry
            for entry, ((condition, _), image) in enumerate(zip(context.entries, images, strict=True))
            if image >= done and (wanted is None or condition in wanted) and self._takes(image, context)
        ]
        if not entries:
            return
        rows = activations.rows.detach().reshape(context.batch, context.positions, -1)
        chosen = [images[entry] for entry in entries]
        position = torch.stack([self._positions(context.positions, image, context) for image in chosen])
        kept = rows[torch.tensor(entries)[:, None].to(rows.device), position.to(rows.device)].to(self.dtype)
        self._seen.append(_Seen(hookpoint, context, kept, entries, chosen, position))

    def end_step(self, context: Context) -> None:
        self._take_in()  # once a step: the device is waited for once for all hookpoints

    def _take_in(self) -> None:
        for seen in self._seen:
            part = seen.collected()
            self._call[seen.hookpoint].append(part)
            self._bytes += part.nbytes if self.folder is None else 0
        self._seen = []
        if self._bytes > self.max_bytes:
            raise MemoryError(
                f"the collected rows take {self._bytes:,} bytes, more than max_bytes {self.max_bytes:,}: "
                "pass folder= to keep them on disk, or fewer rows_per_image"
            )

    def end_call(self, call: Call) -> dict[Hookpoint, CollectedRows]:
        """Keep the call's rows; they are also the recording."""
        self._take_in()
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
            self._rows_kept += len(part.rows)
            if self.folder is None:
                self._kept[hookpoint].append(part)
                continue
            if hookpoint not in self._writers:
                writer = self._writers[hookpoint] = self._open(hookpoint, part.rows.shape[1])
                if writer.mark is not None:
                    raise InUseError(
                        f"another run has written into {writer.folder} meanwhile; run it again, it goes on from there"
                    )
            self._writers[hookpoint].append(part.tensors(), mark=done)
        self._images_done, self._call = done, {}
        return recording

    def collected(self, hookpoint: Hookpoint | str | None = None) -> CollectedRows:
        """What is in memory for a hookpoint (which may be left out if there is one), over all calls.

        Raises:
            ValueError: the hookpoint is not one of these, or nothing was collected there; the rows are in a store.
        """
        chosen = self._choose(hookpoint)
        if self.folder is not None:
            raise ValueError(f"the rows are in a store at {store_of(self.folder, chosen)}: use reader()")
        if not self._kept[chosen]:
            raise ValueError(f"nothing was collected at {chosen}: attach this instrument and call the pipeline first")
        self._kept[chosen] = [_joined(self._kept[chosen])]
        return self._kept[chosen][0]

    def reader(self, hookpoint: Hookpoint | str | None = None) -> ShardReader:
        """A reader of what is on disk for a hookpoint, without the shard in hand: `close` first to have all.

        Raises:
            ValueError: the hookpoint is not one of these; the rows are in memory.
        """
        chosen = self._choose(hookpoint)
        if self.folder is None:
            raise ValueError("the rows are in memory: use collected(), or pass folder= for a store")
        return ShardReader(store_of(self.folder, chosen))

    def close(self) -> None:
        """Write what is buffered. Without a store this does nothing."""
        for writer in self._writers.values():
            writer.close()

    def __enter__(self) -> CollectActivations:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _positions(self, n: int, image: int, context: Context) -> Tensor:
        """The step's stretch of the image's own order of its positions."""
        if self.rows_per_image is None or self.rows_per_image >= n:
            return torch.arange(n)
        first = (context.step or 0) * self.rows_per_image
        at = context.hookpoint
        assert at is not None
        # Not by its io: a module's input and its output are kept at the same positions, as transcoders need them.
        order = self._order(f"{at.path}/{at.stream}/{at.rows}", n, image)
        return order[torch.arange(first, first + self.rows_per_image) % n].sort().values

    def _takes(self, image: int, context: Context) -> bool:
        n = context.n_steps
        if self.steps_per_image is None or context.step is None or n is None or self.steps_per_image >= n:
            return True
        return context.step in self._order("steps", n, image)[: self.steps_per_image]

    def _order(self, of: str, n: int, image: int) -> Tensor:
        """A permutation of n that the seed and the image decide."""
        key = (of, n, image)
        if key not in self._orders:
            # One number for who asks: crc32 mixes well enough, and is the same in every process, unlike hash().
            asked = zlib.crc32(f"{self.seed}/{image}/{of}".encode())
            self._orders[key] = torch.randperm(n, generator=torch.Generator().manual_seed(asked))
        return self._orders[key]

    def _choose(self, hookpoint: Hookpoint | str | None) -> Hookpoint:
        if hookpoint is None and len(self._hookpoints) == 1:
            return self._hookpoints[0]
        chosen = Hookpoint.parse(hookpoint) if isinstance(hookpoint, str) else hookpoint
        if chosen not in self._hookpoints:
            raise ValueError(f"hookpoint is {hookpoint}: choose one of {[str(h) for h in self._hookpoints]}")
        return chosen

    def _open(self, hookpoint: Hookpoint, d_model: int) -> ShardWriter:
        assert self.folder is not None
        fields = {"rows": Field(self.dtype, (d_model,)), **LABELS}
        return ShardWriter(
            store_of(self.folder, hookpoint),
            fields,
            metadata=self._metadata(hookpoint),
            worker=self.worker,
            shard_rows=self.shard_rows,
        )

    def _metadata(self, hookpoint: Hookpoint) -> dict[str, Any]:
        return {
            "hookpoint": str(hookpoint),
            "condition": self.condition,
            "rows_per_image": self.rows_per_image,
            "steps_per_image": self.steps_per_image,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self.metadata,
        }

    def _mark(self, hookpoint: Hookpoint) -> int:
        """The number of the first image that is not on disk for the hookpoint."""
        writer = self._writers.get(hookpoint)
        return self._first if writer is None or writer.mark is None else int(writer.mark)


def _joined(parts: list[CollectedRows]) -> CollectedRows:
    fields = [part.tensors() for part in parts]
    return CollectedRows(**{name: torch.cat([part[name] for part in fields]) for name in fields[0]})
