"""Streaming statistics of codes, for every concept, timestep and latent."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsefeat_kernels import SparseCode, feature_stats_
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.features.folders import read_folder, write_folder
from sparsefeat.frozen import Frozen
from sparsefeat.sae import SAE
from sparsefeat.whole import as_path

Concepts = str | Sequence[str]

# The key of activations read outside the schedule (text encoders run before it is set).
OUTSIDE_SCHEDULE = -1.0

# As many numbers of an SAE's decoder tell it from others, and as near they are in any precision.
DECODER_NUMBERS, DECODER_ROUNDING = 16, 2**-7

# Allocations below this are not worth a line on the terminal.
SAID_FROM_BYTES = 1 << 20


@dataclass
class _Block:
    """The statistics of one timestep: three [concepts, n_latents] tensors, and the rows seen of every concept."""

    total: Tensor  # fp32
    count: Tensor  # int32, active entries
    maximum: Tensor  # fp32; -inf where never active
    rows: Tensor  # int64 [concepts]

    @staticmethod
    def empty(concepts: int, n_latents: int) -> _Block:
        return _Block(
            torch.zeros(concepts, n_latents, dtype=torch.float32),
            torch.zeros(concepts, n_latents, dtype=torch.int32),
            torch.full((concepts, n_latents), -torch.inf, dtype=torch.float32),
            torch.zeros(concepts, dtype=torch.int64),
        )


class Statistics(Frozen):
    """Sum, count and maximum of every latent's activations by concept and timestep, built up a batch at a time.

    Args:
        concepts: names of the concepts.
        n_latents: of the SAE.
        timesteps: where to expect activations; more may come (`add` makes room). Naming them allocates now.

    Timesteps, not step indices, are the keys, so runs of 50 and of 100 steps can be merged or used for one another
    (`nearest`). A position may count for several concepts. Two means are available, and they differ by the firing rate:
    `mean` over all positions (SAeUron's mu) and `mean_active` over the positions where the latent is active (the
    mean.pt of sdxl-unbox). What `add` sees is a row of a code; rows are never kept.

    Size: concepts x timesteps x n_latents x 12 bytes (20 x 50 x 20,480: 234 MiB); printed before it is
    allocated, from 1 MiB on.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(self, concepts: Iterable[str], n_latents: int, timesteps: Iterable[float] = ()):
        self.concepts: tuple[str, ...] = tuple(concepts)
        named = self.concepts and all(isinstance(name, str) for name in self.concepts)
        if isinstance(concepts, str) or not named or len(set(self.concepts)) != len(self.concepts):
            raise ValueError(f"concepts={concepts!r} must be one or more different names, as a list.")
        self.n_latents: int = whole("n_latents", n_latents)
        self._decoder: tuple[float, ...] = ()
        self._blocks: dict[float, _Block] = {}
        self._said_from = SAID_FROM_BYTES
        self.reserve(timesteps)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The timesteps there are statistics for, ascending."""
        return tuple(sorted(self._blocks))

    @property
    def decoder(self) -> tuple[float, ...]:
        """Some numbers of the SAE's decoder, by which it is told from another; none where it is not known."""
        return self._decoder

    def footprint(self, timesteps: int | None = None) -> int:
        """Bytes for this many timesteps (default: those held)."""
        n = len(self._blocks) if timesteps is None else timesteps
        return n * len(self.concepts) * (self.n_latents * 12 + 8)

    def reserve(self, timesteps: Iterable[float]) -> None:
        """Make room for these timesteps, saying first how much it takes.

        Raises:
            ValueError: a timestep that is not finite.
        """
        if not isinstance(timesteps, Iterable) or isinstance(timesteps, str):
            raise ValueError(f"timesteps={timesteps!r:.80} must be a list of numbers.")
        new = [t for t in dict.fromkeys(number("timestep", t) for t in timesteps) if t not in self._blocks]
        if not new:
            return
        if self.footprint(len(new)) >= self._said_from:
            print(
                f"Statistics: {len(self.concepts)} concepts x {len(new)} timesteps x {self.n_latents} latents take "
                f"{self.footprint(len(new)) / 2**20:.1f} MiB.",
                file=sys.stderr,
            )
        for timestep in new:
            self._blocks[timestep] = _Block.empty(len(self.concepts), self.n_latents)

    def add(self, code: SparseCode, concept: Tensor, timestep: float) -> None:
        """Count the rows of a code.

        Args:
            code: padded or CSR, of any device.
            concept: [rows] index into `concepts` of each row; negative: skip the row.
            timestep: of the rows.

        Raises:
            TypeError: `code` is no SparseCode.
            ValueError: it has another number of latents; `concept` is not of its rows, or names none of the concepts.
        """
        if not isinstance(code, SparseCode):
            raise TypeError(f"code is {type(code).__name__}, not a SparseCode; give what sae.encode(x) gives.")
        if code.n_latents != self.n_latents:
            raise ValueError(
                f"the code has {code.n_latents} latents, these statistics {self.n_latents}; use the same SAE."
            )
        if not isinstance(concept, Tensor) or concept.shape != (code.rows,) or concept.is_floating_point():
            raise ValueError(
                f"concept={concept!r:.60} must be a tensor of whole numbers, one for each of {code.rows} rows."
            )
        if concept.numel() and int(concept.max()) >= len(self.concepts):
            raise ValueError(
                f"concept has {int(concept.max())}; these statistics have {len(self.concepts)}, counted from 0."
            )
        self.reserve([timestep])
        block = self._blocks[float(timestep)]
        concept = concept.to("cpu", torch.int32)
        values, indices, group = code.values.detach().cpu(), code.indices.cpu(), concept
        if code.row_offsets is not None:  # every entry a row of its own
            group = concept.repeat_interleave(code.row_offsets.cpu().diff())
            values, indices = values[:, None], indices[:, None]
        feature_stats_(block.total, block.count, block.maximum, values.float(), indices, group)
        block.rows += torch.bincount(concept[concept >= 0].long(), minlength=len(self.concepts))

    def merge(self, *others: Statistics) -> Statistics:
        """New statistics of the rows of this one and the others, over the union of concepts and timesteps.

        Raises:
            TypeError: one of them is no Statistics.
            ValueError: they are of different SAEs.
        """
        parts = (self, *others)
        for part in others:
            check_statistics(part)
        if len({part.n_latents for part in parts}) > 1:
            raise ValueError(f"only statistics of one SAE merge; these have {[p.n_latents for p in parts]} latents.")
        concepts = tuple(dict.fromkeys(c for part in parts for c in part.concepts))
        merged = Statistics(concepts, self.n_latents, sorted({t for part in parts for t in part.timesteps}))
        for part in parts:
            merged.take(part)
        return merged

    def part(self, concepts: Iterable[str], decoder: tuple[float, ...] = ()) -> Statistics:
        """Empty ones of some of the concepts, to be taken once they are whole, or thrown away; their size is not said.

        decoder: of the SAE, `decoder_numbers`, where these may not know it yet.

        Raises:
            ValueError: a concept that is not there.
        """
        part = type(self)([self.concepts[place] for place in self.places(tuple(concepts))], self.n_latents)
        part._said_from = sys.maxsize
        part._decoder = decoder or self._decoder
        return part

    def take(self, part: Statistics) -> None:
        """Count the rows of a part, whose concepts are all here.

        Raises:
            ValueError: a concept that is not there; a part of another SAE.
        """
        places = self.places(part.concepts)
        if not _same(self.decoder, part.decoder):
            raise ValueError("only statistics of one SAE are counted together; these are of two with as many latents.")
        self._decoder = self._decoder or part.decoder
        self.reserve(part.timesteps)
        for timestep, block in part._blocks.items():
            into = self._blocks[timestep]
            into.total[places] += block.total
            into.count[places] += block.count
            into.rows[places] += block.rows
            into.maximum[places] = torch.maximum(into.maximum[places], block.maximum)

    def nearest(self, timestep: float) -> float:
        """The timestep of these statistics that is nearest to `timestep` (of two equally near ones the smaller).

        Raises:
            ValueError: they are empty, or `timestep` is not finite.
        """
        if not self._blocks:
            raise ValueError(
                "these statistics are empty; collect some first, with CollectStatistics or collect_statistics."
            )
        wanted = number("timestep", timestep)
        return min(self.timesteps, key=lambda t: (abs(t - wanted), t))

    def others(self, *concepts: str) -> tuple[str, ...]:
        """All concepts but these.

        Raises:
            ValueError: a concept that is not there.
        """
        self.places(concepts)
        return tuple(c for c in self.concepts if c not in concepts)

    def total(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp64 [n_latents]: sum of the activations over the rows of these concepts, at one timestep or all.

        Raises:
            ValueError: a concept or timestep that is not there.
        """
        total = sum(
            (block.total[places].double().sum(0) for block, places in self._pooled(concepts, timestep)), self._zeros()
        )
        return finite("the statistics' total", total)

    def count(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp64 [n_latents]: number of rows in which the latent was active.

        Raises:
            ValueError: as `total`.
        """
        return sum(
            (block.count[places].double().sum(0) for block, places in self._pooled(concepts, timestep)), self._zeros()
        )

    def rows(self, concepts: Concepts, timestep: float | None = None) -> int:
        """Number of rows seen.

        Raises:
            ValueError: as `total`.
        """
        return sum(int(block.rows[places].sum()) for block, places in self._pooled(concepts, timestep))

    def maximum(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp32 [n_latents]: the largest activation; 0 where there was none.

        Raises:
            ValueError: as `total`.
        """
        largest = torch.stack(
            [block.maximum[places].amax(0) for block, places in self._pooled(concepts, timestep)]
        ).amax(0)
        return largest.masked_fill(largest == -torch.inf, 0)

    def mean(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp64 [n_latents]: mean over all rows, active or not. Several concepts are pooled row by row.

        Raises:
            ValueError: as `total`.
        """
        return self.total(concepts, timestep) / max(1, self.rows(concepts, timestep))

    def mean_active(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp64 [n_latents]: mean over the rows where the latent is active; 0 where it never was.

        Raises:
            ValueError: as `total`.
        """
        return self.total(concepts, timestep) / self.count(concepts, timestep).clamp(min=1)

    def frequency(self, concepts: Concepts, timestep: float | None = None) -> Tensor:
        """fp64 [n_latents]: share of the rows in which the latent is active.

        Raises:
            ValueError: as `total`.
        """
        return self.count(concepts, timestep) / max(1, self.rows(concepts, timestep))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `statistics.json` and its tensors, whole or not at all; in the place of earlier ones of the same kind.

        Raises:
            FileExistsError: `folder` holds statistics of other concepts or another SAE's width.
            TypeError: it is no path. ValueError: it is empty, or what it holds is damaged. OSError: it cannot be written.
        """
        if (as_path(folder) / "statistics.json").is_file():
            earlier = self.load(folder)
            same = (earlier.concepts, earlier.n_latents) == (self.concepts, self.n_latents)
            if not same or not _same(earlier.decoder, self.decoder):
                raise FileExistsError(
                    f"folder={str(folder)!r} holds statistics of other concepts or another SAE; save to another folder."
                )
        tensors: dict[str, Tensor] = {}
        for i, timestep in enumerate(self.timesteps):
            block = self._blocks[timestep]
            tensors |= {
                f"{i}.total": block.total,
                f"{i}.count": block.count,
                f"{i}.maximum": block.maximum,
                f"{i}.rows": block.rows,
            }
        config = {
            "concepts": list(self.concepts),
            "n_latents": self.n_latents,
            "timesteps": list(self.timesteps),
            "decoder": list(self.decoder),
        }
        write_folder(folder, "statistics", config, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Statistics:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there are none in `folder`. TypeError: it is no path. ValueError: they are damaged.
        """
        config, tensors = read_folder(folder, "statistics")
        try:
            statistics = cls(config["concepts"], config["n_latents"])
            statistics._decoder = tuple(number("decoder", one) for one in config.get("decoder", ()))
            for i, timestep in enumerate(config["timesteps"]):
                block = _Block(*(tensors.pop(f"{i}.{name}") for name in ("total", "count", "maximum", "rows")))
                _check(block, _Block.empty(len(statistics.concepts), statistics.n_latents))
                statistics._blocks[number("timestep", timestep)] = block
            if tensors:
                raise ValueError(f"it has {min(tensors)} more than its timesteps")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"folder={str(folder)!r} holds damaged statistics ({error}); collect them again."
            ) from None
        return statistics

    def __repr__(self) -> str:
        return (
            f"Statistics({len(self.concepts)} concepts, {len(self._blocks)} timesteps, {self.n_latents} latents, "
            f"{self.footprint() / 2**20:.1f} MiB)"
        )

    def places(self, concepts: Concepts) -> Tensor:
        """int64 `[concepts]`: where these stand in `self.concepts`.

        Raises:
            ValueError: one that is not there, or none.
        """
        several = isinstance(concepts, Iterable) and not isinstance(concepts, str)
        names = tuple(concepts) if several else (concepts,)
        unknown = ", ".join(repr(name) for name in names if name not in self.concepts)
        if unknown or not names:
            known = ", ".join(self.concepts)
            raise ValueError(f"concept={unknown or concepts} is not in these statistics, which have {known}.")
        return torch.tensor([self.concepts.index(name) for name in names])

    def _pooled(self, concepts: Concepts, timestep: float | None) -> list[tuple[_Block, Tensor]]:
        places = self.places(concepts)
        if timestep is not None and number("timestep", timestep) not in self._blocks:
            known = ", ".join(f"{t:g}" for t in self.timesteps) or "none"
            raise ValueError(
                f"timestep={timestep} has no statistics (there are: {known}); look one up with .nearest()."
            )
        chosen = self.timesteps if timestep is None else (float(timestep),)
        return [(self._blocks[t], places) for t in chosen]

    def _zeros(self) -> Tensor:
        return torch.zeros(self.n_latents, dtype=torch.float64)


def check_statistics(given: Any, sae: SAE | None = None) -> None:
    """Refuse what is no `Statistics`, and those of another SAE than this one."""
    if not isinstance(given, Statistics):
        raise TypeError(
            f"statistics is {type(given).__name__}, not a Statistics; collect them, collect_statistics(...)."
        )
    if sae is not None and given.n_latents != sae.n_latents:
        raise ValueError(f"statistics are of {given.n_latents} latents, the SAE has {sae.n_latents}; use those of it.")
    if sae is not None and not _same(given.decoder, decoder_numbers(sae)):
        raise ValueError(
            "statistics are of another SAE with as many latents, which mean other things; collect those of this one."
        )


def decoder_numbers(sae: SAE) -> tuple[float, ...]:
    """What `Statistics.decoder` is of an SAE; none of one without data (meta)."""
    decoder = sae.W_dec.detach().flatten()
    if decoder.is_meta:
        return ()
    places = torch.linspace(0, decoder.numel() - 1, DECODER_NUMBERS, dtype=torch.float64).long()
    return tuple(decoder[places.to(decoder.device)].double().tolist())


def _same(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    """Whether two SAEs may be one, as far as is known."""
    if not one or not other:
        return True
    a, b = torch.tensor(one, dtype=torch.float64), torch.tensor(other, dtype=torch.float64)
    return len(a) == len(b) and torch.allclose(a, b, rtol=DECODER_ROUNDING, atol=1e-6)


def _check(block: _Block, like: _Block) -> None:
    """Raise ValueError for what `add` cannot have counted."""
    for name, given in vars(block).items():
        wanted = getattr(like, name)
        if given.shape != wanted.shape or given.dtype != wanted.dtype:
            raise ValueError(
                f"{name} is {list(given.shape)} of {given.dtype}, not {list(wanted.shape)} of {wanted.dtype}"
            )
        finite(name, given, unbounded=name == "maximum")
    if min(block.count.min(), block.rows.min()) < 0:
        raise ValueError("something was counted less than 0 times")


def concepts_of(name: str, given: Any) -> tuple[str, ...]:
    """The concepts of one prompt: a text, several, or None for none."""
    several = isinstance(given, Iterable) and not isinstance(given, (str, bytes))
    names = () if given is None else tuple(given) if several else (given,)
    if not all(isinstance(one, str) for one in names):
        raise ValueError(f"{name}={given!r:.80} must be a concept's name, a list of names, or None.")
    return names
