"""Record: the codes of a call, by step, image and position, and what can be read from them."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.arguments import latent_number, number, truth, whole
from sparsefeat.attention import HeatMap
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.pipeline import Activations, Call, Context, FrozenInstrument, Hookpoint
from sparsefeat.pipeline.context import CONDITIONS
from sparsefeat.pipeline.weakly import Weakly
from sparsefeat.sae import SAE
from sparsefeat.store import Field, ShardReader, ShardWriter
from sparsefeat.whole import as_path

# What a Record may hold before it spills or stops: 50 steps of 100 images at 256 positions and k = 32 take 328 MB.
MAX_BYTES = 512 << 20


class TopLatent(NamedTuple):
    """One latent of `Recording.top`.

    score: its mean activation over the image's positions, the steps and the images: comparable between runs of different
        length.
    maximum: its largest activation. frequency: share of the positions and steps in which it is active.
    name: where the SAE's latents have names (`sae.names`), else None.
    """

    latent: int
    score: float
    maximum: float
    frequency: float
    name: str | None = None

    def __repr__(self) -> str:
        said = [f"{field}={value!r}" for field, value in self._asdict().items() if value is not None]
        return f"TopLatent({', '.join(said)})"


@dataclass(frozen=True)
class Pooled:
    """A code pooled over its rows: of every latent that is active somewhere, ascending, sum, maximum and count."""

    latents: Tensor
    total: Tensor  # fp64
    maximum: Tensor  # fp64
    count: Tensor  # int64
    rows: int


def pool(code: SparseCode) -> Pooled:
    """Pool a code over its rows, in the order of its entries (deterministic on a CPU)."""
    values, indices = code.values.reshape(-1), code.indices.reshape(-1)
    active = values != 0
    latents, place = indices[active].long().unique(return_inverse=True)
    values = values[active].double()
    total = torch.zeros(len(latents), dtype=torch.float64).index_add_(0, place, values)
    count = torch.bincount(place, minlength=len(latents))
    maximum = torch.full((len(latents),), -torch.inf, dtype=torch.float64).scatter_reduce_(0, place, values, "amax")
    return Pooled(latents, total, maximum, count, code.rows)


def join(codes: Iterable[SparseCode]) -> SparseCode:
    """The rows of several codes of one SAE, one after the other: padded if all are and are equally wide, else CSR."""
    codes = list(codes)
    if all(c.row_offsets is None and c.values.shape[1] == codes[0].values.shape[1] for c in codes):
        return SparseCode(
            torch.cat([c.values for c in codes]), torch.cat([c.indices for c in codes]), codes[0].n_latents
        )
    entries = [active_entries(c) for c in codes]
    lengths = torch.cat([torch.bincount(row, minlength=c.rows) for c, (row, _, _) in zip(codes, entries, strict=True)])
    return SparseCode(
        torch.cat([values for _, _, values in entries]),
        torch.cat([latents for _, latents, _ in entries]),
        codes[0].n_latents,
        torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
    )


def active_entries(code: SparseCode) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of every entry that is not 0, row by row."""
    active = code.values != 0
    return code.row_ids[active], code.indices[active], code.values[active]


class Record(FrozenInstrument):
    """Instrument: keeps the codes of a call. `run[record]` is a `Recording`.

    Args:
        sae: whose codes.
        at: hookpoint; default the SAE's.
        condition: which rows ("cond" or "uncond"; some pipelines have "image" or "perturbed" besides).
        positions: keep every position's code, from which maps are drawn; False keeps, of every step and image, each
            active latent's sum, maximum and count only (some tens of times smaller; no `map`, no `codes`).
        max_bytes: of codes held in memory (8 bytes an entry: a Stable Diffusion 1.5 image at k = 32 takes 64 KiB a
            step), of all calls of a session together. Past it, codes go to `store`; without one the codes of the earliest
            calls are let go, with a warning, and a call that is larger by itself stops with an error.
        store: folder for the codes past `max_bytes`; each call writes into a folder of its own inside it.

    Raises:
        TypeError: `sae` is no SAE, or `store` no path.
        ValueError: an argument that cannot be, by its name; an SAE that does not know its hookpoint, or with NaN in its
            weights.
    """

    def __init__(
        self,
        sae: SAE,
        at: str | Hookpoint | None = None,
        condition: str = "cond",
        positions: bool = True,
        max_bytes: int = MAX_BYTES,
        store: str | os.PathLike[str] | None = None,
    ):
        self.sae: SAE = sae
        self.condition: str = condition
        self.positions: bool = positions
        self.max_bytes: int = max_bytes
        self.store: str | os.PathLike[str] | None = store
        if condition not in CONDITIONS:
            raise ValueError(f"condition={condition!r} is not known; use one of {', '.join(map(repr, CONDITIONS))}.")
        truth("positions", positions)
        whole("max_bytes", max_bytes, 0)
        if store is not None:
            as_path(store, "store")
        self.at: Hookpoint = hookpoint_of(sae, at)
        self._recording: Recording | None = None
        self._writer: ShardWriter | None = None
        self._earlier: list[Weakly[Recording]] = []  # of earlier calls, as long as somebody has them

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def begin_call(self, call: Call) -> None:
        self._close()  # of a call that was interrupted
        self._recording = Recording(self.sae.n_latents, call.images_per_prompt, call.prompts, self.positions)
        self._recording.names = self.sae.names

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        recording = self._recording
        wanted = [(b, image) for b, (condition, image) in enumerate(context.entries) if condition == self.condition]
        if recording is None or context.recomputing or not wanted:
            return
        code, positions = activations.code(beside(self.sae, activations, context)), context.positions
        for b, image in wanted:
            part = code.slice_rows(b * positions, (b + 1) * positions).to("cpu")
            recording._add(context, image, part)
        self._make_room(recording)

    def _make_room(self, recording: Recording) -> None:
        earlier = [kept for reference in self._earlier if (kept := reference()) is not None and kept.nbytes]
        for kept in earlier:
            if recording.nbytes + sum(other.nbytes for other in earlier) <= self.max_bytes:
                return
            if self.store is not None and self.positions:
                writer = self._new_writer(self.store, recording.n_latents)
                kept._spill(writer)
                writer.close()
            else:
                kept._let_go(self.max_bytes)
        if recording.nbytes <= self.max_bytes:
            return
        if self.store is None or not self.positions:
            raise MemoryError(
                f"Record holds {recording.nbytes / 2**20:.0f} MiB of codes, more than max_bytes={self.max_bytes}; pass "
                "store=<folder> to continue on disk, positions=False to keep sums only, or a larger max_bytes."
            )
        if self._writer is None:
            self._writer = self._new_writer(self.store, recording.n_latents)
        recording._spill(self._writer)

    def _new_writer(self, store: str | os.PathLike[str], n_latents: int) -> ShardWriter:
        Path(store).mkdir(parents=True, exist_ok=True)
        taken = {path.name for path in Path(store).iterdir()}
        name = next(name for i in itertools.count() if (name := f"call-{i:04d}") not in taken)
        return ShardWriter(Path(store) / name, _STORED, metadata={"n_latents": n_latents, "hookpoint": str(self.at)})

    def end_call(self, call: Call) -> Recording:
        recording, self._recording = self._recording, None
        assert recording is not None  # it is made when the call begins
        if self._writer is not None:
            recording._spill(self._writer)  # the rest of it, so that a call is in one folder
        self._close()
        self._earlier = [reference for reference in self._earlier if reference() is not None]
        self._earlier.append(Weakly(recording))
        return recording

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


# What a store of codes has in a row: one active entry.
_STORED = {"position": Field(torch.int32), "latent": Field(torch.int32), "value": Field(torch.float32)}


class Recording:
    """The codes of one call.

    Attributes:
        n_latents: of the SAE.
        prompts: of the call, if it was given text; image i belongs to prompt i // images_per_prompt.
        images: indices in the pipeline's output of the images that were recorded, in order: all, except at a text
            encoder, where a prompt runs once for all its images and counts for the first.
        grid: (height, width) of the positions, or None where they are not on a grid (text).
        timesteps: step -> timestep.
        names: latent -> name, of the SAE, as far as it has any.
    """

    def __init__(
        self, n_latents: int, images_per_prompt: int = 1, prompts: Iterable[str] | None = None, positions: bool = True
    ):
        self.n_latents: int = n_latents
        self.images_per_prompt: int = images_per_prompt
        self.positions: bool = positions
        self.prompts: tuple[str, ...] | None = None if prompts is None else tuple(prompts)
        self.images: tuple[int, ...] = ()
        self.grid: tuple[int, ...] | None = None
        self.timesteps: dict[int | None, float | None] = {}
        self.names: Mapping[int, str] = {}
        self.nbytes: int = 0
        self._codes: dict[tuple[int | None, int], SparseCode] = {}
        self._pooled: dict[tuple[int | None, int], Pooled] = {}
        self._stored: dict[tuple[int | None, int], tuple[Path, int, int, int]] = {}  # folder, entries from-to, rows
        self._when: dict[tuple[int | None, int], tuple[int, int | None]] = {}  # loop and evaluation
        self._loops: dict[int, list[int]] = {}  # of each image, in order
        self._gone: int | None = None  # the max_bytes that it was let go for

    def __repr__(self) -> str:
        grid = "no grid" if self.grid is None else " x ".join(map(str, self.grid))
        return f"Recording({self.n_images} images, {len(self.steps)} steps, {grid}, {self.n_latents} latents)"

    @property
    def n_images(self) -> int:
        return len(self.images)

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The steps that were recorded, in order; (None,) for a text encoder, which runs before the schedule."""
        return tuple(self.timesteps)

    def prompt(self, image: int) -> str | None:
        """The prompt of an image.

        Raises:
            ValueError: an image that was not recorded.
        """
        self._check_image(image)
        return self.prompts[image // self.images_per_prompt] if self.prompts else None

    def codes(self, step: int | None = None, image: int | None = None) -> SparseCode:
        """The codes of one step (default: the first recorded), of one image or of all in order; row = position.

        Raises:
            ValueError: a step or image that was not recorded; a recording without positions.
        """
        self._need_positions("codes")
        step = self.steps[0] if step is None and None not in self.timesteps else step
        images = self.images if image is None else (image,)
        return join(self._code(step, i) for i in images)

    def map(self, latent: int, image: int = 0, step: int | None = None) -> Tensor:
        """fp32 map of one latent over the image [height, width] (or [positions] where there is no grid).

        At one step, or the mean over all. Its mean is the latent's `score` for this image.

        Raises:
            ValueError: a latent, step or image that is not there; a recording without positions.
        """
        return self.maps([latent], image, step)[0]

    def heat(self, latent: int | Mapping[int, float], image: int = 0, step: int | None = None) -> HeatMap:
        """`map` of one latent as a heat map: its picture over the image, and its mask, `rec.heat(12).mask(0.5)`. Of several,
        `{12: 0.8, 40: 0.5}`, the sum of their maps by these weights.

        Raises:
            ValueError: no latents, or a weight that is not finite; as `map`.
        """
        if not isinstance(latent, Mapping):
            return HeatMap(self.map(latent, image, step), self._called(latent))
        if not latent:
            raise ValueError("latent={} names no latents; give their weights, {12: 0.8, 40: 0.5}.")
        weights = [number(f"latent[{one!r}]", weight) for one, weight in latent.items()]
        maps = self.maps(list(latent), image, step)
        called = [*map(self._called, list(latent)[:3]), *([f"{len(latent) - 3} more"] if len(latent) > 3 else [])]
        return HeatMap(torch.tensordot(maps.new_tensor(weights), maps, 1), ", ".join(called))

    def _called(self, latent: int) -> str:
        return self.names.get(latent) or f"latent {latent}"

    def maps(self, latents: Sequence[int], image: int = 0, step: int | None = None) -> Tensor:
        """`map` of several latents, [latents, height, width].

        Raises:
            ValueError: as `map`.
        """
        self._need_positions("map")
        if isinstance(latents, str) or not isinstance(latents, (Sequence, Tensor)):
            raise ValueError(f"latents={latents!r:.80} must be a list of latents; of one, .map({latents!r:.80}).")
        for one in latents:
            latent_number("latent", one, self.n_latents)
        self._check_image(image)
        steps = self.steps if step is None else (step,)
        wanted = torch.as_tensor(list(latents), dtype=torch.int64)
        total = sum((self._code(s, image).select(wanted).float() for s in steps), torch.zeros((), dtype=torch.float32))
        return (total / len(steps)).T.reshape(len(wanted), *(self.grid or (-1,)))

    def scores(self) -> Tensor:
        """fp32 [images, n_latents]: every latent's `score` in every image, in the order of `images`; a table for numpy or pandas."""
        return torch.stack([self._dense((image,), self.steps)[0] for image in self.images]).float()

    def pooled(self, image: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of one image: the latents that are active somewhere, ascending; their scores; their maxima."""
        score, maximum, count, _ = self._dense((image,), self.steps)
        latents = count.nonzero()[:, 0]
        return latents, score[latents], maximum[latents]

    def top(self, n: int = 10, image: int | None = None, step: int | None = None) -> list[TopLatent]:
        """The n latents with the highest score, highest first, equal ones by index.

        score = mean over positions and steps, of one image or averaged over all: the score of sdxl-unbox (arXiv
        2410.22366), a sum over steps, divided by their number. With `step`, of that step alone. Latents that are active nowhere are left out.

        Raises:
            ValueError: `n` is below 1; a step or image that was not recorded.
        """
        whole("n", n)
        images = self.images if image is None else (image,)
        score, maximum, count, rows = self._dense(images, self.steps if step is None else (step,))
        active = count.nonzero()[:, 0]
        order = active[score[active].argsort(descending=True, stable=True)[:n]]
        return [
            TopLatent(i, float(score[i]), float(maximum[i]), float(count[i]) / rows, self.names.get(i))
            for i in order.tolist()
        ]

    def _dense(self, images: Sequence[int], steps: Sequence[int | None]) -> tuple[Tensor, Tensor, Tensor, int]:
        """Score, maximum and count of every latent, and the number of positions, over images and steps."""
        score = torch.zeros(self.n_latents, dtype=torch.float64)
        maximum = torch.full((self.n_latents,), -torch.inf, dtype=torch.float64)
        count = torch.zeros(self.n_latents, dtype=torch.int64)
        rows = 0
        for s in steps:
            for i in images:
                pooled = self._pool(s, i)
                score[pooled.latents] += pooled.total / pooled.rows / (len(images) * len(steps))
                maximum[pooled.latents] = torch.maximum(maximum[pooled.latents], pooled.maximum)
                count[pooled.latents] += pooled.count
                rows += pooled.rows
        return score, maximum, count, rows

    def _add(self, context: Context, image: int, code: SparseCode) -> None:
        step, when = context.step, (context.loop, context.evaluation)
        loops = self._loops.setdefault(image, [])
        if context.loop not in loops:
            loops.append(context.loop)
        if step is not None:  # a call that runs its loop again for the same image goes on counting
            step += loops.index(context.loop) * (context.n_steps or 0)
        key = (step, image)
        if key in self._when:
            if context.evaluation is None or self._when[key] != when:
                return  # the second evaluation of a second-order scheduler's step
            self._forget(key)  # the model ran again before the scheduler stepped: the last run is the one it steps on
        self._when[key] = when
        self.grid = context.grid
        self.timesteps.setdefault(step, context.timestep)
        if image not in self.images:
            self.images = tuple(sorted((*self.images, image)))
        if self.positions:
            # Copies: a slice would keep the batch's whole code alive.
            code = SparseCode(
                code.values.detach().clone(),
                code.indices.to(torch.int32, copy=True),
                code.n_latents,
                None if code.row_offsets is None else code.row_offsets.clone(),
            )
            self._codes[key] = code
            self.nbytes += code.values.nbytes + code.indices.nbytes
        else:
            self._pooled[key] = pooled = pool(code)
            self.nbytes += _nbytes(pooled)

    def _forget(self, key: tuple[int | None, int]) -> None:
        code, pooled = self._codes.pop(key, None), self._pooled.pop(key, None)
        self._stored.pop(key, None)
        if code is not None:
            self.nbytes -= code.values.nbytes + code.indices.nbytes
        if pooled is not None:
            self.nbytes -= _nbytes(pooled)

    def _let_go(self, max_bytes: int) -> None:
        """Give up the codes, for those of a later call."""
        warnings.warn(
            "sparsefeat: this Record let the codes of an earlier call go, as all its recordings together came to more than "
            f"max_bytes={max_bytes}; read each before the next call, or pass store=<folder> or a larger max_bytes",
            UserWarning,
            stacklevel=2,
        )
        self._codes, self._pooled, self._stored, self.nbytes, self._gone = {}, {}, {}, 0, max_bytes

    def _code(self, step: int | None, image: int) -> SparseCode:
        self._check_image(image)
        self._check_step(step)
        return self._codes[step, image] if (step, image) in self._codes else self._read(*self._stored[step, image])

    def _spill(self, writer: ShardWriter) -> None:
        """Move the codes in memory to a store."""
        done = writer.n_rows
        for key, code in self._codes.items():
            position, latent, value = active_entries(code)
            writer.append({"position": position.int(), "latent": latent.int(), "value": value.float()})
            self._stored[key] = (writer.folder, done, done + len(value), code.rows)
            done += len(value)
        writer.flush()
        self._codes, self.nbytes = {}, 0

    def _read(self, folder: Path, start: int, stop: int, rows: int) -> SparseCode:
        entries = ShardReader(folder).rows(torch.arange(start, stop))
        lengths = torch.bincount(entries["position"], minlength=rows)
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return SparseCode(entries["value"], entries["latent"], self.n_latents, offsets)

    def _pool(self, step: int | None, image: int) -> Pooled:
        if self.positions:
            return pool(self._code(step, image))
        self._check_image(image)
        self._check_step(step)
        return self._pooled[step, image]

    def _need_positions(self, what: str) -> None:
        if not self.positions:
            raise ValueError(
                f"this recording kept no positions, which .{what}() needs; record with Record(positions=True)."
            )

    def _check_image(self, image: int) -> None:
        if image not in self.images:
            raise ValueError(f"image={image} was not recorded; there are {list(self.images)}.")

    def _check_step(self, step: int | None) -> None:
        if self._gone is not None:
            raise ValueError(
                f"the codes of this call were let go for those of later ones, as max_bytes={self._gone}; read a recording "
                "before the next call, or record with store=<folder> or a larger max_bytes."
            )
        if step not in self.timesteps:
            raise ValueError(f"step={step} was not recorded; there are {list(self.steps)}.")


def _nbytes(pooled: Pooled) -> int:
    return pooled.latents.nbytes + pooled.total.nbytes + pooled.maximum.nbytes + pooled.count.nbytes
