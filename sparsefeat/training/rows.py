"""Where training rows come from: a tensor in memory, or a store too large for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from sparsefeat.arguments import finite
from sparsefeat.store import ShardReader


class RowSource(Protocol):
    """Activation rows that can be gone through epoch by epoch, in an order that `seed` and `epoch` alone decide."""

    @property
    def n_rows(self) -> int: ...

    @property
    def d_model(self) -> int: ...

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0) -> Iterator[Tensor]:
        """The epoch's full batches `[batch_size, d_model]`, without the first `skip`; what is left over is dropped."""
        ...


class TensorRows:
    """Rows of one tensor; dimensions before the last are flattened."""

    def __init__(self, rows: Tensor) -> None:
        if rows.ndim < 2 or not rows.is_floating_point():
            raise ValueError(
                f"rows is {rows.dtype} of shape {list(rows.shape)}: pass floating activations [rows, d_model]"
            )
        self.rows = finite("rows", rows).reshape(-1, rows.shape[-1])

    @property
    def n_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def d_model(self) -> int:
        return self.rows.shape[1]

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0) -> Iterator[Tensor]:
        order = torch.randperm(self.n_rows, generator=epoch_generator(seed, epoch))
        for start in range(skip * batch_size, self.n_rows - batch_size + 1, batch_size):
            yield self.rows[order[start : start + batch_size].to(self.rows.device)]


class StoreRows:
    """The rows of one field of a store, shuffled as `ShardReader.batches` shuffles."""

    def __init__(self, reader: ShardReader, field: str = "rows") -> None:
        if field not in reader.schema or len(reader.schema[field].shape) != 1:
            offered = [name for name, spec in reader.schema.items() if len(spec.shape) == 1]
            raise ValueError(f"field {field!r} is no field of rows in {reader.folder}: choose one of {offered}")
        self.reader, self.field = reader, field

    @property
    def n_rows(self) -> int:
        return self.reader.n_rows

    @property
    def d_model(self) -> int:
        return self.reader.schema[self.field].shape[0]

    def batches(self, batch_size: int, *, seed: int, epoch: int = 0, skip: int = 0) -> Iterator[Tensor]:
        for batch in self.reader.batches(
            batch_size, fields=[self.field], seed=seed, epoch=epoch, skip=skip, drop_last=True
        ):
            yield batch[self.field]


def stream(source: RowSource, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Batches without end, epoch after epoch, from batch number `start` on."""
    epoch, skip = divmod(start, source.n_rows // batch_size)
    while True:
        yield from source.batches(batch_size, seed=seed, epoch=epoch, skip=skip)
        epoch, skip = epoch + 1, 0


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    # Torch's CPU generator keeps 64 bits of seed; the multiplier keeps (seed, epoch) pairs apart.
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
