"""Looking for features: the images a latent responds to most, and the latents that respond to a concept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsefeat.arguments import latent_number, mapping, whole, wholes
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.features.chance import LATENTS_AT_ONCE, Naming, best_of_latents, name_of
from sparsefeat.features.record import Record, Recording
from sparsefeat.features.scores import area_under_curve, normalized_mean_difference
from sparsefeat.features.statistics import Concepts, Statistics, check_statistics, concepts_of
from sparsefeat.frozen import Frozen
from sparsefeat.pipeline import Activations, Call, Context, FrozenInstrument, Hookpoint
from sparsefeat.sae import SAE


class Example(NamedTuple):
    """An image on which a latent is active.

    image: the image's number in the order in which images were drawn. prompt: its prompt, if known.
    score: the latent's mean activation over positions and steps. map: fp32 [height, width], the activation's mean over
    steps.
    """

    image: int
    prompt: str | None
    score: float
    map: Tensor

    def __repr__(self) -> str:
        return f"Example(image={self.image}, prompt={self.prompt!r}, score={self.score:.4g})"


class Found(NamedTuple):
    """A latent that responds to a concept.

    score: SAeUron's, see `normalized_mean_difference`. mean, frequency: over the concept's positions. auc: probability
    that the latent's largest activation is higher in an image with the concept than in one without (ties half). p: how
    often, with the concept dealt out to images at random, the best of all latents reaches that: an AUC of 0.9 with p
    above 0.05 says nothing. Both None without examples.
    """

    latent: int
    score: float
    mean: float
    frequency: float
    auc: float | None
    p: float | None


class Examples(Frozen):
    """The images with the highest score for each latent, and every image's largest activations; streaming.

    Args:
        n_latents: of the SAE.
        top: how many images to keep for a latent.
        latents: those to keep examples of; default all.

    Size: 12 bytes for each latent and place, the maps of the images that hold a place (half precision: 512 bytes at
    16 x 16), and 8 bytes for each latent active somewhere in an image (for the area under the curve).

    Raises:
        TypeError: `n_latents` is an SAE.
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(self, n_latents: int, top: int = 9, latents: Sequence[int] | None = None):
        if isinstance(n_latents, SAE):
            raise TypeError("n_latents is an SAE; give its number of latents, Examples(sae.n_latents).")
        self.n_latents: int = whole("n_latents", n_latents)
        self.top: int = whole("top", top)
        self.allowed: Tensor = torch.ones(n_latents, dtype=torch.bool)
        if latents is not None:
            self.allowed[:] = False
            self.allowed[wholes("latents", latents, 0, n_latents - 1)] = True
        self.prompts: list[str | None] = []
        self.concepts: list[tuple[str, ...]] = []
        self._n_drawn = 0
        self._number: list[int] = []  # of each image that was added, among these
        self._score = torch.full((n_latents, top), -torch.inf, dtype=torch.float64)
        self._image = torch.full((n_latents, top), -1, dtype=torch.int32)
        self._maps: dict[tuple[int, int], Tensor] = {}
        self._peaks: list[tuple[Tensor, Tensor]] = []

    @property
    def n_drawn(self) -> int:
        """The images of all calls, also those that a recording has not: at a text encoder, all but a prompt's first."""
        return self._n_drawn

    def __len__(self) -> int:
        return len(self.prompts)

    def __repr__(self) -> str:
        return f"Examples({len(self)} images, {self.n_latents} latents, the top {self.top} of each)"

    @property
    def nbytes(self) -> int:
        """What is held now."""
        maps = sum(m.nbytes for m in self._maps.values())
        return self._score.nbytes + self._image.nbytes + maps + sum(a.nbytes + b.nbytes for a, b in self._peaks)

    def add(self, recording: Recording, concepts: Sequence[Concepts | None] | None = None) -> None:
        """Take in the images of a recording.

        Args:
            recording: with positions.
            concepts: of each image of the recording, for `area_under_curve`.

        Raises:
            TypeError: `recording` is none.
            ValueError: `concepts` has not an entry for each image; a recording without positions.
        """
        if not isinstance(recording, Recording):
            raise TypeError(f"recording is {type(recording).__name__}, not a Recording; give a Record's, run[record].")
        if isinstance(concepts, str):
            raise ValueError(f"concepts={concepts!r} must be a list, one entry for each image.")
        if concepts is not None and len(concepts) != recording.n_images:
            raise ValueError(
                f"concepts= has {len(concepts)} entries for {recording.n_images} images; give one for each."
            )
        drawn = len(recording.prompts or ()) * recording.images_per_prompt or max(recording.images, default=-1) + 1
        self._number += [self.n_drawn + image for image in recording.images]
        self._n_drawn += drawn
        for n, image in enumerate(recording.images):
            number = len(self.prompts)
            self.prompts.append(recording.prompt(image))
            given = None if concepts is None else concepts[n]
            self.concepts.append(concepts_of(f"concepts[{n}]", given))
            latents, score, peak = recording.pooled(image)
            self._peaks.append((latents.to(torch.int32), peak.float()))
            kept = self.allowed[latents]
            self._place(recording, image, number, latents[kept], score[kept])

    def _place(self, recording: Recording, image: int, number: int, latents: Tensor, score: Tensor) -> None:
        """Give the image a place with each latent for which it scores above the lowest kept; earlier ones win ties."""
        better = score > self._score[latents, -1]
        latents, score = latents[better], score[better]
        if not len(latents):
            return
        for latent, lost in zip(latents.tolist(), self._image[latents, -1].tolist(), strict=True):
            self._maps.pop((latent, lost), None)
        # Append, and sort stably: an equal score goes behind those that came before.
        scores = torch.cat([self._score[latents, :-1], score[:, None]], 1)
        images = torch.cat([self._image[latents, :-1], torch.full((len(latents), 1), number, dtype=torch.int32)], 1)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        self._score[latents], self._image[latents] = scores.gather(1, order), images.gather(1, order)
        maps = recording.maps(latents.tolist(), image).half()
        for latent, one in zip(latents.tolist(), maps, strict=True):
            self._maps[latent, number] = one.clone()

    def of(self, latent: int) -> list[Example]:
        """The examples of a latent, highest score first.

        Raises:
            ValueError: a latent that is not there, or of which no examples are kept.
        """
        if not self.allowed[latent_number("latent", latent, self.n_latents)]:
            raise ValueError(f"latent={latent} is not among those that examples are kept of; name it in latents=.")
        pairs = zip(self._image[latent].tolist(), self._score[latent].tolist(), strict=True)
        return [Example(self._number[i], self.prompts[i], s, self._maps[latent, i].float()) for i, s in pairs if i >= 0]

    def peaks(self, latent: int) -> Tensor:
        """fp32 [images]: the largest activation of a latent in every image, over positions and steps; 0 where none."""
        peaks = torch.zeros(len(self._peaks), dtype=torch.float32)
        for n, (latents, values) in enumerate(self._peaks):
            place = int(torch.searchsorted(latents, latent))
            if place < len(latents) and int(latents[place]) == latent:
                peaks[n] = values[place]
        return peaks

    @property
    def active(self) -> Tensor:
        """The latents that are active in some image, ascending."""
        return torch.cat([torch.zeros(0, dtype=torch.int32), *(latents for latents, _ in self._peaks)]).unique().long()

    def peaks_of_all(self) -> Iterator[Tensor]:
        """`peaks` of the `active` latents, fp32 [latents, images] a part at a time."""
        if not self._peaks:
            return
        latents, values = (torch.cat(parts) for parts in zip(*self._peaks, strict=True))
        images = torch.arange(len(self._peaks)).repeat_interleave(torch.tensor([len(p) for p, _ in self._peaks]))
        active, place = latents.unique(return_inverse=True)
        for start in range(0, len(active), LATENTS_AT_ONCE):
            inside = (place >= start) & (place < start + LATENTS_AT_ONCE)
            part = torch.zeros(min(LATENTS_AT_ONCE, len(active) - start), len(self._peaks), dtype=torch.float32)
            part[place[inside] - start, images[inside]] = values[inside]
            yield part

    def has(self, concept: str) -> Tensor:
        """bool [images]: whether the image was added with the concept.

        Raises:
            ValueError: all images were added with the concept, or none.
        """
        has = torch.tensor([concept in names for names in self.concepts])
        if not has.any() or has.all():
            raise ValueError(
                f"concept={concept!r} belongs to {int(has.sum())} of {len(has)} images; add images with and without it."
            )
        return has

    def area_under_curve(self, latent: int, concept: str) -> float:
        """How well the latent's largest activation tells images with the concept from those without (0.5: not).

        Raises:
            ValueError: as `has`.
        """
        has, peaks = self.has(concept), self.peaks(latent)
        return area_under_curve(peaks[has], peaks[~has])

    def name(self, latent: int, words: Sequence[str] | None = None, choosing: Tensor | None = None) -> Naming:
        """The word (default: of all concepts) that fits a latent best, and whether it is more than chance: `name_of`.

        Raises:
            ValueError: the images were added without words.
        """
        known = tuple(dict.fromkeys(c for names in self.concepts for c in names)) if words is None else tuple(words)
        if not known:
            raise ValueError(
                "the images were added without words, so there is none to name a latent by; give CollectExamples concepts="
            )
        return name_of(self.peaks(latent), self.concepts, known, choosing)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that is held: what JSON holds of it, and the tensors by name. `Examples.from_state` makes it again."""
        known = {"n_latents": self.n_latents, "top": self.top, "prompts": self.prompts, "concepts": self.concepts}
        known |= {"number": self._number, "n_drawn": self.n_drawn}
        latents, values = zip(*self._peaks, strict=True) if self._peaks else ((), ())
        return known, {
            "allowed": self.allowed,
            "score": self._score,
            "image": self._image,
            "map_of": torch.tensor(list(self._maps), dtype=torch.int32).reshape(-1, 2),
            "maps": torch.stack(list(self._maps.values())) if self._maps else torch.zeros(0, dtype=torch.float32),
            "peak_latents": torch.cat([torch.zeros(0, dtype=torch.int32), *latents]),
            "peak_values": torch.cat([torch.zeros(0, dtype=torch.float32), *values]),
            "peak_lengths": torch.tensor([len(of_image) for of_image in latents], dtype=torch.int64),
        }

    @classmethod
    def from_state(cls, known: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Examples:
        examples = cls(int(known["n_latents"]), int(known["top"]))
        examples.prompts.extend(known["prompts"])
        examples.concepts.extend(tuple(names) for names in known["concepts"])
        examples._number = list(known.get("number", range(len(examples.prompts))))  # without: of an earlier version
        examples._n_drawn = int(known.get("n_drawn", len(examples.prompts)))
        examples.allowed.copy_(tensors["allowed"])
        examples._score, examples._image = tensors["score"], tensors["image"]
        of = [(latent, image) for latent, image in tensors["map_of"].tolist()]
        examples._maps = dict(zip(of, tensors["maps"].unbind(), strict=True))
        lengths = tensors["peak_lengths"].tolist()
        peaks = (tensors[name].split(lengths) for name in ("peak_latents", "peak_values"))
        examples._peaks = list(zip(*peaks, strict=True))
        return examples


class CollectExamples(FrozenInstrument):
    """Instrument: adds the images of every call to `examples`; `run[collect]` is the same object.

    Args:
        sae, at: as in `Record`; codes of one call are held until it ends.
        examples: where they go.
        concepts: prompt -> concept (or several), for `Examples.area_under_curve`.

    Raises:
        TypeError: `sae` or `examples` is no such thing.
        ValueError: examples of another number of latents; an argument that cannot be, by its name.
    """

    def __init__(
        self,
        sae: SAE,
        examples: Examples,
        concepts: Mapping[str, Concepts | None] | None = None,
        at: str | Hookpoint | None = None,
    ):
        at = hookpoint_of(sae, at)
        if not isinstance(examples, Examples):
            raise TypeError(f"examples is {type(examples).__name__}, not Examples; make some, Examples(sae.n_latents).")
        if examples.n_latents != sae.n_latents:
            raise ValueError(f"examples are of {examples.n_latents} latents, the SAE has {sae.n_latents}.")
        if concepts is not None:
            for prompt, its in mapping(
                "concepts", concepts, 'each prompt to its words, {"a red fox": ["red", "fox"]}'
            ).items():
                concepts_of(f"concepts[{prompt!r}]", its)
        self.sae: SAE = sae
        self.examples: Examples = examples
        self.concepts: Mapping[str, Concepts | None] | None = concepts
        self.at: Hookpoint = at
        self._record = Record(sae, self.at)

    def conditions(self) -> tuple[str, ...] | None:
        return self._record.conditions()

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def begin_call(self, call: Call) -> None:
        self._record.begin_call(call)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        self._record.at_hookpoint(activations, context)

    def end_call(self, call: Call) -> Examples:
        recording = self._record.end_call(call)
        if recording is not None:
            known = None
            if self.concepts is not None:
                known = [self.concepts.get(recording.prompt(i) or "") for i in recording.images]
            self.examples.add(recording, known)
        return self.examples


def search(
    statistics: Statistics,
    concept: str,
    n: int = 10,
    *,
    timestep: float | None = None,
    others: Sequence[str] | None = None,
    examples: Examples | None = None,
) -> list[Found]:
    """The n latents with the highest positive score for a concept, highest first.

    Args:
        statistics: of the concept and at least one other.
        timestep: look at one timestep (the nearest there is); default all pooled.
        others: concepts to compare with; default all others, pooled.
        examples: images with this concept and without, for the area under the curve and what chance gives.

    Raises:
        TypeError: `statistics` or `examples` is no such thing.
        ValueError: the concept is not in the statistics, or alone there; `n` is below 1.
    """
    whole("n", n)
    check_statistics(statistics)
    if examples is not None and not isinstance(examples, Examples):
        raise TypeError(f"examples is {type(examples).__name__}, not Examples; give those that CollectExamples filled.")
    if others is not None and (isinstance(others, str) or not isinstance(others, Sequence) or not others):
        raise ValueError(f"others={others!r:.80} must be a list of concepts, or left out for all others.")
    against = statistics.others(concept) if others is None else tuple(others)
    if not against:
        raise ValueError(f"concept={concept!r} is the only one in the statistics; collect prompts without it too.")
    at = None if timestep is None else statistics.nearest(timestep)
    mean, frequency = statistics.mean(concept, at), statistics.frequency(concept, at)
    scores = normalized_mean_difference(mean, statistics.mean(against, at))
    order = scores.argsort(descending=True, stable=True)[:n]
    best = order[scores[order] > 0].tolist()
    aucs: list[float | None] = [None] * len(best)
    chances: list[float | None] = [None] * len(best)
    if examples is not None:
        areas = [examples.area_under_curve(i, concept) for i in best]
        aucs, chances = [*areas], [*best_of_latents(examples.peaks_of_all(), examples.has(concept), areas)]
    return [
        Found(i, float(scores[i]), float(mean[i]), float(frequency[i]), auc, p)
        for i, auc, p in zip(best, aucs, chances, strict=True)
    ]
