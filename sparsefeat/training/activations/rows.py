"""Where training rows come from: a tensor in memory, or a store too large for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsefeat.arguments import finite
from sparsefeat.store import ShardReader
from sparsefeat.training.objective.losses import Batch
from sparsefeat.training.ranks import ALONE, Ranks


class RowSource(Protocol):
    """Activation rows that can be gone through epoch by epoch, in an order that `seed` and `epoch` alone decide."""

    @property
    def n_rows(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        """The epoch's full batches of `[batch_size, d_model]`, without the first `skip`; what is left over is dropped.

        Of each batch the rows that are this rank's: those of all ranks are the batch, in any order and of any number.
        """
        ...


class TensorRows:
    """Rows of one tensor; dimensions before the last are flattened.

    target: of the same shape, what a transcoder makes of each row. timestep: of each row, for an SAE that depends on it.
    """

    def __init__(self, rows: Tensor, target: Tensor | None = None, timestep: Tensor | None = None) -> None:
        if rows.ndim < 2 or not rows.is_floating_point():
            raise ValueError(
                f"rows is {rows.dtype} of shape {list(rows.shape)}: pass floating activations [rows, d_model]"
            )
        self.rows: Tensor = finite("rows", rows).reshape(-1, rows.shape[-1])
        if target is not None and target.shape != rows.shape:
            raise ValueError(f"target has shape {list(target.shape)}, rows {list(rows.shape)}: they must agree")
        self.target: Tensor | None = None if target is None else finite("target", target).reshape(self.rows.shape)
        if timestep is not None and timestep.shape != rows.shape[:-1]:
            raise ValueError(f"timestep has shape {list(timestep.shape)}: give one for every row, {self.n_rows}")
        self.timestep: Tensor | None = None if timestep is None else finite("timestep", timestep).flatten()

    @property
    def n_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def d_model(self) -> int:
        return self.rows.shape[1]

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        order = torch.randperm(self.n_rows, generator=epoch_generator(seed, epoch))
        for start in range(skip * batch_size, self.n_rows - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size][ranks.part(batch_size)].to(self.rows.device)
            yield Batch(*(None if t is None else t[chosen] for t in (self.rows, self.target, self.timestep)))


class StoreRows:
    """The rows of one field of a store, shuffled as `ShardReader.batches` shuffles; its field "timestep", if it has one, goes
    with them. A rank reads its own part of every shard and nothing else.

    target: the store of what a transcoder makes of each row, collected in one run with it.
    """

    def __init__(self, reader: ShardReader, field: str = "rows", target: ShardReader | None = None) -> None:
        if field not in reader.schema or len(reader.schema[field].shape) != 1:
            offered = [name for name, spec in reader.schema.items() if len(spec.shape) == 1]
            raise ValueError(f"field {field!r} is no field of rows in {reader.folder}: choose one of {offered}")
        self.reader: ShardReader = reader.check()
        self.field: str = field
        self.beside: list[str] = [name for name in ("timestep",) if name in reader.schema and name != field]
        self.target: ShardReader | None = None if target is None else target.check()
        if self.target is not None and not _same_rows(reader, self.target):
            raise ValueError(
                f"{self.target.folder} has other rows than {reader.folder}: collect a module's input and output in one run"
            )

    @property
    def n_rows(self) -> int:
        return self.reader.n_rows

    @property
    def d_model(self) -> int:
        return self.reader.schema[self.field].shape[0]

    def batches(
        self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0, ranks: Ranks = ALONE
    ) -> Iterator[Batch]:
        how: dict[str, Any] = {"seed": seed, "epoch": epoch, "skip": skip, "drop_last": True}
        how["part"] = (ranks.rank, ranks.world)
        own = self.reader.batches(batch_size, fields=[self.field, *self.beside], **how)
        if self.target is None:
            for batch in own:
                yield Batch(batch[self.field], None, batch.get("timestep"))
            return
        for batch, made in zip(own, self.target.batches(batch_size, fields=[self.field], **how), strict=True):
            yield Batch(batch[self.field], made[self.field], batch.get("timestep"))


def _same_rows(one: ShardReader, other: ShardReader) -> bool:
    """Whether row i of both is of the same image, step and position, as far as the first and the last shard show."""
    if [shard.n_rows for shard in one.shards] != [shard.n_rows for shard in other.shards]:
        return False
    labels = [name for name in ("image", "step", "position", "condition") if name in one.schema]
    if not set(labels) <= set(other.schema):
        return False
    for number in {0, len(one.shards) - 1} if labels and one.shards else ():
        here, there = (reader.read_shard(number, labels) for reader in (one, other))
        if any(not torch.equal(here[name], there[name]) for name in labels):
            return False
    return True


class Source(Protocol):
    """Where a run's batches are from: at several places, all in step."""

    def origin(self, place: int) -> Mapping[str, Any]:
        """What the rows are of, as JSON has it: a run that goes on has to go on with the same. Empty where it is not known."""
        ...

    def check(self, batch_size: int) -> None:
        """Raise ValueError if there can be no such batches, as far as that is known."""
        ...

    def sample(self, place: int, n: int, seed: int, ranks: Ranks) -> Batch:
        """Up to n rows, the same on all ranks: start values are taken from them."""
        ...

    def stream(self, batch_size: int, seed: int, start: int, ranks: Ranks) -> Iterator[list[Batch]]:
        """Batches without end from number `start` on, for every place this rank's part of it."""
        ...


class SideBySide:
    """Sources that are gone through at once, each epoch after epoch."""

    def __init__(self, *sources: RowSource) -> None:
        self.sources = sources

    def origin(self, place: int) -> Mapping[str, Any]:
        source = self.sources[place]
        if isinstance(source, TensorRows):
            return {"n_rows": source.n_rows}
        return source.reader.metadata if isinstance(source, StoreRows) else {}

    def check(self, batch_size: int) -> None:
        for source in self.sources:
            if source.n_rows < batch_size:
                raise ValueError(
                    f"batch_size is {batch_size} but there are {source.n_rows} rows: make it smaller, or collect more"
                )

    def sample(self, place: int, n: int, seed: int, ranks: Ranks) -> Batch:
        source = self.sources[place]
        return next(source.batches(min(source.n_rows, n), seed=seed))

    def stream(self, batch_size: int, seed: int, start: int, ranks: Ranks) -> Iterator[list[Batch]]:
        return map(
            list, zip(*(_stream(source, batch_size, seed, start, ranks) for source in self.sources), strict=True)
        )


def _stream(source: RowSource, batch_size: int, seed: int, start: int, ranks: Ranks) -> Iterator[Batch]:
    epoch, skip = divmod(start, source.n_rows // batch_size)
    while True:
        yield from source.batches(batch_size, seed=seed, epoch=epoch, skip=skip, ranks=ranks)
        epoch, skip = epoch + 1, 0


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # Torch's CPU generator keeps 64 bits of seed; the multiplier keeps (seed, epoch) pairs apart.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
