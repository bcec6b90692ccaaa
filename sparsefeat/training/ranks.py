"""The processes that share one run: what `torchrun` says of them, and sums over them.

A program that was started alone is one rank of one. Collection needs nothing but the numbers; training joins the ranks in
`torch.distributed`, over NCCL on GPUs and gloo on CPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """`rank` of `world`, and its place `local` on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank={self.rank!r} must be from 0 to {self.world - 1}, of world={self.world}.")

    @classmethod
    def of_environment(cls) -> Ranks:
        """What `torchrun`, or whoever sets RANK, WORLD_SIZE and LOCAL_RANK as it does, says."""
        try:
            said = [
                os.environ.get(name, alone) for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            ]
            rank, world, local = map(int, said)
            return cls(rank, world, local)
        except ValueError as error:
            raise ValueError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are no ranks ({error}): start it with torchrun."
            ) from None

    @property
    def shared(self) -> bool:
        return self.world > 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, device: str) -> str:
        """Ranks of one machine have a GPU each."""
        return f"{device}:{self.local}" if self.world > 1 and device in ("cuda", "xpu") else device

    def part(self, n: int) -> slice:
        """This rank's stretch of n things; the stretches differ by one at most and cover all."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    @contextmanager
    def joined(self, device: str) -> Iterator[Ranks]:
        """The process group of these ranks while this is open; none for one rank alone, or where there is one already."""
        if self.world == 1 or dist.is_initialized():
            yield self
            return
        if device.startswith("cuda"):
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", rank=self.rank, world_size=self.world)
        try:
            yield self
        finally:
            dist.destroy_process_group()

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks, in place; returns it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def least(self, tensor: Tensor) -> Tensor:
        """Of all ranks, in place; returns it."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks what the first has, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def gather(self, thing: Any) -> list[Any]:
        """What each rank has, in their order: for small things, now and then."""
        if self.world == 1:
            return [thing]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, thing)
        return found

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so on any rank."""
        return flag if self.world == 1 else bool(self.sum(torch.tensor(int(flag), device=device)))


ALONE = Ranks()
