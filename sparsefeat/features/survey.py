"""What the codes of many images say of every latent of an SAE: where and when it is active, how strongly, with which others.

Streaming: the images' codes are let go once they are counted. Saved and loaded, so that a run that is killed goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsefeat.arguments import whole
from sparsefeat.features.chance import midranks
from sparsefeat.features.folders import read_folder, write_folder
from sparsefeat.features.record import Recording
from sparsefeat.features.search import Examples
from sparsefeat.features.statistics import Concepts

# Activations are counted between 2^(i/2) and 2^((i+1)/2): two bars an octave, from 2^-16 to 2^16.
BARS_AN_OCTAVE = 2
LOWEST_OCTAVE, HIGHEST_OCTAVE = -16, 16
N_BARS = BARS_AN_OCTAVE * (HIGHEST_OCTAVE - LOWEST_OCTAVE)

# Positions whose active latents are kept to see which are active together: of k = 32 they take 16 MiB.
ROWS_KEPT = 1 << 17
# With fewer of them, shares of a latent's positions say nothing.
LEAST_ROWS = 20

LATENTS_AT_ONCE = 1024


class Neighbour(NamedTuple):
    """A latent beside another. cosine: of their decoder directions."""

    latent: int
    cosine: float


class Companion(NamedTuple):
    """A latent that is active where another is.

    share: of the positions of the other, those where this one is active too. base: of all positions. cosine: of the two
    sets of positions, `n_both / sqrt(n_one n_other)`, by which companions are ranked.
    """

    latent: int
    share: float
    base: float
    cosine: float


class Survey:
    """Counts of the codes of `n_images` images, added a call at a time.

    Args:
        n_latents: of the SAE.
        n_images: how many will come in all; which positions are kept depends on it.
        top: images kept for each latent.

    Attributes:
        examples: `Examples` of the same images.
        timesteps: of each step that was seen, in order.

    Size: what `Examples` takes, 16 bytes for each latent and step, 512 for each latent, and the kept positions (16 MiB at
    k = 32).
    """

    def __init__(self, n_latents: int, n_images: int, top: int = 9):
        self.n_latents: int = whole("n_latents", n_latents)
        self.n_images: int = whole("n_images", n_images)
        self.examples: Examples = Examples(n_latents, top)
        self.timesteps: tuple[float | None, ...] = ()
        self._total = torch.zeros(0, n_latents, dtype=torch.float64)  # [steps, latents]
        self._count = torch.zeros(0, n_latents, dtype=torch.int64)
        self._rows = torch.zeros(0, dtype=torch.int64)
        self._bars = torch.zeros(n_latents, N_BARS, dtype=torch.int64)
        self._kept: list[Tensor] = []  # int32 [rows, k], -1 where nothing is active

    def add(self, recording: Recording, concepts: Sequence[Concepts | None] | None = None) -> None:
        """Take in the images of a recording (with positions) and the concepts of each.

        Raises:
            ValueError: it has other steps than the recordings before, or is of another SAE.
        """
        if recording.n_latents != self.n_latents:
            raise ValueError(
                f"recording is of {recording.n_latents} latents, the survey of {self.n_latents}; use the same SAE."
            )
        timesteps = tuple(recording.timesteps.values())
        if not self.timesteps:
            self.timesteps = timesteps
            self._total = torch.zeros(len(timesteps), self.n_latents, dtype=torch.float64)
            self._count = torch.zeros(len(timesteps), self.n_latents, dtype=torch.int64)
            self._rows = torch.zeros(len(timesteps), dtype=torch.int64)
        if timesteps != self.timesteps:
            raise ValueError("recording has other timesteps than those before; draw all with as many steps.")
        first = len(self.examples)
        self.examples.add(recording, concepts)
        for n, step in enumerate(recording.steps):
            for i, image in enumerate(recording.images):
                code = recording.codes(step, image)
                values, latents = code.values.reshape(-1), code.indices.reshape(-1).long()
                active = values != 0
                values, of = values[active].double(), latents[active]
                self._total[n].index_add_(0, of, values)
                self._count[n] += torch.bincount(of, minlength=self.n_latents)
                self._rows[n] += code.rows
                bar = ((values.abs().log2() - LOWEST_OCTAVE) * BARS_AN_OCTAVE).floor().long().clamp(0, N_BARS - 1)
                self._bars.view(-1).index_add_(0, of * N_BARS + bar, torch.ones_like(of))
                row = code.row_ids.reshape(-1)[active]
                self._keep(row, of, code.rows, (first + i) * len(self.timesteps) + n)

    def _keep(self, row: Tensor, latents: Tensor, rows: int, number: int) -> None:
        """The active latents of some positions of one image's step, drawn by its number alone."""
        kept = max(1, ROWS_KEPT // (self.n_images * len(self.timesteps)))
        chosen = torch.randperm(rows, generator=torch.Generator().manual_seed(number))[:kept]
        place = torch.full((rows,), -1)
        place[chosen] = torch.arange(len(chosen))
        inside = place[row] >= 0
        at, of = place[row[inside]], latents[inside]
        lengths = torch.bincount(at, minlength=len(chosen))
        order = at.argsort(stable=True)
        starts = lengths.cumsum(0) - lengths
        column = torch.arange(len(order)) - starts[at[order]]
        table = torch.full((len(chosen), int(lengths.max())), -1, dtype=torch.int32)
        table[at[order], column] = of[order].int()
        self._kept.append(table)

    # What it says -----------------------------------------------------------------------------------------------------

    @property
    def density(self) -> Tensor:
        """fp64 [latents]: the share of all positions and steps in which the latent is active."""
        return self._count.sum(0).double() / max(1, int(self._rows.sum()))

    @property
    def mean_active(self) -> Tensor:
        """fp64 [latents]: mean activation where the latent is active; 0 where it never was."""
        return self._total.sum(0) / self._count.sum(0).clamp(min=1)

    def by_step(self, latent: int) -> Tensor:
        """fp64 [steps]: the mean activation over all positions at each step."""
        return self._total[:, latent] / self._rows.clamp(min=1)

    def bars(self, latent: int) -> tuple[list[float], list[int]]:
        """The histogram of the latent's activations (their magnitude): the edges of the bars, powers of the square root of
        two, and how many activations lie between; from the lowest bar that has any to the highest."""
        counts = self._bars[latent]
        filled = counts.nonzero()[:, 0]
        if not len(filled):
            return [], []
        low, high = int(filled[0]), int(filled[-1]) + 1
        edges = [2.0 ** (i / BARS_AN_OCTAVE + LOWEST_OCTAVE) for i in range(low, high + 1)]
        return edges, counts[low:high].tolist()

    def areas(self, words: Sequence[str]) -> Tensor:
        """fp32 [latents, words]: how well the latent's largest activation tells the images with the word from the others, as
        the area under the curve; 0.5 for a latent that is active in none, NaN for a word of all images or none."""
        member = torch.tensor([[word in names for names in self.examples.concepts] for word in words]).double()
        member = member.reshape(len(words), len(self.examples.concepts))  # of no words too
        n_with = member.sum(1)
        pairs = n_with * (member.shape[1] - n_with)
        areas = torch.full((self.n_latents, len(words)), 0.5, dtype=torch.float32)
        areas[:, pairs == 0] = torch.nan
        active, first = self.examples.active, 0
        for peaks in self.examples.peaks_of_all():
            found = (midranks(peaks) @ member.T - n_with * (n_with + 1) / 2) / pairs
            areas[active[first : first + len(peaks)]] = found.float()
            first += len(peaks)
        return areas

    def companions(self, n: int = 8) -> Iterator[list[Companion]]:
        """For each latent in turn, those that are active at most of the same positions; none for a latent that is active at
        fewer than `LEAST_ROWS` of the kept ones."""
        width = max((table.shape[1] for table in self._kept), default=0)
        table = torch.cat([torch.nn.functional.pad(t, (0, width - t.shape[1]), value=-1) for t in self._kept])
        entries = table.reshape(-1).long()
        active = (entries >= 0).nonzero()[:, 0]
        order = active[entries[active].argsort(stable=True)]
        counts = torch.bincount(entries[order], minlength=self.n_latents)
        starts = counts.cumsum(0) - counts
        for latent in range(self.n_latents):
            own = int(counts[latent])
            if own < LEAST_ROWS:
                yield []
                continue
            rows = order[int(starts[latent]) : int(starts[latent]) + own] // width
            beside = table[rows].reshape(-1).long()
            both = torch.bincount(beside[beside >= 0], minlength=self.n_latents)
            both[latent] = 0
            cosine = both / (own * counts.clamp(min=1)).double().sqrt()
            best = cosine.topk(min(n, self.n_latents))
            yield [
                Companion(j, int(both[j]) / own, int(counts[j]) / len(table), float(c))
                for j, c in zip(best.indices.tolist(), best.values.tolist(), strict=True)
                if c > 0
            ]

    @property
    def rows_kept(self) -> int:
        """How many positions `companions` looks at."""
        return sum(len(table) for table in self._kept)

    # Disk --------------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `survey.json` and its tensors into `folder`, in the place of an earlier one, whole or not at all."""
        known, tensors = self.examples.state()
        config = {
            "n_latents": self.n_latents,
            "n_images": self.n_images,
            "timesteps": self.timesteps,
            "examples": known,
        }
        width = max((table.shape[1] for table in self._kept), default=0)
        kept = [torch.nn.functional.pad(table, (0, width - table.shape[1]), value=-1) for table in self._kept]
        mine = {
            "total": self._total,
            "count": self._count,
            "rows": self._rows,
            "bars": self._bars,
            "kept": torch.cat(kept) if kept else torch.zeros(0, 0, dtype=torch.int32),
        }
        write_folder(folder, "survey", config, {**mine, **{f"examples.{name}": one for name, one in tensors.items()}})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Survey:
        """What `save` wrote. Raises FileNotFoundError where there is none, ValueError where it is damaged."""
        config, tensors = read_folder(folder, "survey")
        survey = cls(int(config["n_latents"]), int(config["n_images"]), int(config["examples"]["top"]))
        of_examples = {name.removeprefix("examples."): t for name, t in tensors.items() if name.startswith("examples.")}
        survey.examples = Examples.from_state(config["examples"], of_examples)
        survey.timesteps = tuple(config["timesteps"])
        survey._total, survey._count, survey._rows = tensors["total"], tensors["count"], tensors["rows"]
        survey._bars = tensors["bars"]
        survey._kept = [tensors["kept"]] if len(tensors["kept"]) else []
        return survey


def nearest_by_decoder(W_dec: Tensor, n: int = 8) -> Iterator[list[Neighbour]]:
    """For each latent in turn, the n others whose decoder directions [n_latents, d_model] have the largest cosine with its
    own; none for a direction of zero. Memory: `LATENTS_AT_ONCE` x n_latents numbers."""
    unit = torch.nn.functional.normalize(W_dec.detach().float().cpu(), dim=1)
    for start in range(0, len(unit), LATENTS_AT_ONCE):
        cosines = unit[start : start + LATENTS_AT_ONCE] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -torch.inf
        best = cosines.topk(min(n, len(unit) - 1), dim=1)
        for latent, (values, indices) in enumerate(zip(best.values, best.indices, strict=True)):
            zero = not unit[start + latent].any()
            yield [] if zero else [Neighbour(*pair) for pair in zip(indices.tolist(), values.tolist(), strict=True)]
