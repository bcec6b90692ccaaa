"""Which condition and which image each batch entry of a denoiser belongs to.

A guider says it itself. Elsewhere the text that each entry of a run is given is compared, by value, with what the
prompts and the negative prompts became (references.py), wherever among the model's arguments it lies. What the text
cannot tell apart (the perturbed rows of PAG have the prompt's text too) the pipeline's class does, as far as the text
agrees; the class alone is believed where there is nothing to compare and the pipeline's loop is diffusers' own. What is
left is "unknown".

The answer for a run holds for every later one that is given the same tensors, so a call compares, and waits for the
device, once for each distinct run of a step. Where a pipeline makes its embeddings anew in every step, the runs of later
steps are compared without waiting, and looked at when the call is over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sparsefeat.pipeline.context import UNKNOWN, Call
from sparsefeat.pipeline.knowing.references import Reference, References, rows_of_texts

Entries = tuple[tuple[str, ...], tuple[int, ...]]
"""(condition of each batch entry, index of the image each becomes)."""

Layout = tuple[str, ...]
"""The conditions of the chunks of a run's batch; each chunk holds every image once."""

Evidence = dict[str, tuple[int, ...]]
"""What the text of one entry is: condition -> the images whose text it is. Empty where it is none of the references'."""

# Read in diffusers 0.42.1. The key is a pattern that is looked for in the names of the pipeline's class and of its bases.
_LAYOUTS: dict[str, dict[int, Layout]] = {
    "InstructPix2Pix": {3: ("cond", "image", "uncond")},
    "OmniGen": {2: ("cond", "uncond"), 3: ("cond", "uncond", "image")},
    "PAG": {2: ("cond", "perturbed"), 3: ("uncond", "cond", "perturbed")},
    "^(Lumina(Text2Img)?Pipeline|ZImage|DiTPipeline|StableCascade|Wuerstchen|AceStep)": {2: ("cond", "uncond")},
}
_USUAL: dict[int, Layout] = {1: ("cond",), 2: ("uncond", "cond")}

# The arguments of a run of the model that leaves a part of it out: skip-layer guidance of SD3, spatio-temporal and
# modality guidance of LTX-2.
_PERTURBING = ("skip_layers", "spatio_temporal_guidance_blocks", "isolate_modalities")

# The runs of one step where a pipeline runs its denoiser on one condition after the other. No pipeline of diffusers
# 0.42.1 has the unconditional one first.
_PASSES = ("cond", "uncond")

# Whose text a row of a condition has.
_TEXT_OF = {"cond": "cond", "perturbed": "cond", "uncond": "uncond", "image": "uncond"}

# Embeddings that went through a narrower dtype on their way are near their reference, not equal to it: 2**-6 is four
# times bf16's rounding. Then all others have to be four times as far.
_NEAR, _APART = 2**-6, 4.0


@dataclass(frozen=True)
class DenoiserRun:
    """One run of a denoiser: its arguments by name, the entries of its batch, and the batch sizes of the runs before it in
    the same step.
    """

    component: str
    arguments: Mapping[str, Any]
    batch: int
    earlier: tuple[int, ...] = ()
    loop: int = 0
    """Which of the call's ways through the schedule it is in."""


@dataclass
class Conditions:
    """What is known of the conditions in one call."""

    call: Call
    references: References
    layout: tuple[Layout, ...] | None = None
    """The runs of a step as the user stated them."""
    _known: dict[Any, tuple[Entries, list[list[torch.Tensor]], torch.Tensor]] = field(default_factory=dict)
    _deciding: dict[Any, tuple[int, ...]] = field(default_factory=dict)  # which of the arguments told, by kind of run
    _first: dict[Any, tuple[Entries, torch.Tensor]] = field(default_factory=dict)
    _references: list[Reference] = field(default_factory=list)
    _n_found: int = 0
    _passed: dict[Any, Any] = field(default_factory=dict)
    _assumed: list[torch.Tensor] = field(default_factory=list)
    _sizes: dict[str, dict[int, int]] = field(default_factory=dict)  # by component and loop: the images of its runs

    def entries(self, pipe: Any, run: DenoiserRun, guided: str | None) -> Entries:
        """The entries of this run. `guided` is what a guider says of it."""
        n_images = self.call.n_images
        if n_images is None:  # neither prompts nor embeddings: guidance, or who states it, tells how many chunks
            usual = 2 if self.call.guidance and run.batch % 2 == 0 else 1
            n_images = run.batch // (usual if self.layout is None else len(self._stated(run)))
        if guided is not None:
            return (guided,) * run.batch, _in_turn(run.batch, n_images)
        references = self._references_and_zeros()
        texts = list(_texts(run.arguments, run.batch, references))
        shapes = tuple(tuple(row.shape for row in rows) for rows in texts)
        pattern = (run.component, run.batch, run.earlier, run.loop, self.call.guidance, len(references), shapes)
        if pattern in self._deciding:
            texts = [texts[i] for i in self._deciding[pattern]]
        key = (pattern, tuple(map(_key, texts)))
        if key not in self._known:
            pairs, distances = _measure(texts, references)
            if pattern in self._deciding and distances.device.type != "cpu":
                # Embeddings made anew in each step: as in the step before, which is looked at when the call is over.
                return self._assume(distances, *self._first[pattern])
            evidence, decides = _evidence(pairs, distances.tolist(), run.batch)  # the one wait
            entries = self._resolve(pipe, run, n_images, evidence)
            if pattern not in self._deciding:
                texts = [texts[i] for i in decides]
                distances = _measure(texts, references)[1]
                self._deciding[pattern] = decides
                self._first[pattern] = entries, distances
                key = (pattern, tuple(map(_key, texts)))
            self._known[key] = entries, texts, distances  # the tensors are kept, so that no other one gets their memory
            return entries
        entries, _, before = self._known[key]
        if any(_is_uncounted(rows[0]) for rows in texts):
            self._assume(_measure(texts, references)[1], entries, before)
        return entries

    def _assume(self, distances: torch.Tensor, entries: Entries, before: torch.Tensor) -> Entries:
        """The entries that texts at these distances had, without a look at the distances until the call is over."""
        self._assumed.append((distances != before).any())
        return entries

    def _references_and_zeros(self) -> list[Reference]:
        """The references; where none is unconditional, zeros too, which many pipelines take for the text of no prompt."""
        found = self.references.found
        if len(found) != self._n_found:
            without = not any(reference.condition == "uncond" for reference in found)
            zeros = [replace(r, condition="uncond", tensor=torch.zeros_like(r.tensor)) for r in found if without]
            self._n_found, self._references = len(found), found + zeros
        return self._references

    def passed_through(self, given: Iterable[Any], output: Any) -> None:
        """A component was `given` texts and made `output` of them (the connectors of LTX-2, ACE-Step's condition encoder):
        that is the same texts'. Waits for the device once, if there is a text of a prompt among what it was given.
        """
        given = dict(enumerate(given))
        batch = next((len(rows) for value in _flat(given.values()) if (rows := rows_of_texts(value))), 0)
        references = self._references_and_zeros()
        texts = list(_texts(given, batch, references))
        key = tuple(map(_key, texts))
        if not texts or key in self._passed:
            return  # again in every step
        self._passed[key] = texts  # kept, so that no other tensors get their memory
        pairs, distances = _measure(texts, references)
        evidence, _ = _evidence(pairs, distances.tolist(), batch)
        made = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
        for rows in map(rows_of_texts, made):
            if len(rows) == batch:
                self.references.found += [
                    Reference(condition, image, 1, row.detach())
                    for row, seen in zip(rows, evidence, strict=True)
                    for condition, images in seen.items()
                    for image in images
                ]

    def changed(self) -> bool:
        """Whether a text was another one than in the step that its label was taken from. Waits for the device once, if
        there was such a step.
        """
        assumed, self._assumed = self._assumed, []
        return bool(torch.stack(assumed).any()) if assumed else False

    def _resolve(self, pipe: Any, run: DenoiserRun, n_images: int, evidence: list[Evidence]) -> Entries:
        first, here = 0, n_images
        rows_per_image = self.call.arguments.get("ensemble_size") or 1
        if run.batch < n_images * rows_per_image and not (
            self.call.guidance or run.earlier
        ):  # some of the images in each loop
            sizes = self._sizes.setdefault(run.component, {})
            sizes.setdefault(run.loop, run.batch)
            first, here = sum(size for loop, size in sizes.items() if loop < run.loop), run.batch
        chunks = run.batch // here if here and run.batch % here == 0 else 0
        images = tuple((first + i) // rows_per_image % n_images for i in range(here))
        trusted = self.layout is not None or self.call.own_loop or is_diffusers_own(pipe)
        for layout in self._proposals(pipe, run, here, chunks):
            entries = tuple(c for c in layout for _ in images), images * chunks
            if _agrees(entries, evidence) and (trusted or all(len(seen) == 1 for seen in evidence)):
                return entries
            if self.layout is not None:
                raise ValueError(
                    f"layout={self.layout!r} was stated, but the texts that {type(pipe).__name__} gave its denoiser are not in "
                    "that order: leave it out, or state the order of its batch"
                )
        return _seen(evidence) or ((UNKNOWN,) * run.batch, _in_turn(run.batch, n_images))

    def _stated(self, run: DenoiserRun) -> Layout:
        assert self.layout is not None
        return self.layout[len(run.earlier) % len(self.layout)]

    def _proposals(self, pipe: Any, run: DenoiserRun, n_images: int, chunks: int) -> Iterator[Layout]:
        """The layouts that the run may have, the likeliest first."""
        call = self.call
        if self.layout is not None:
            if len(stated := self._stated(run)) == chunks:
                yield stated
            return
        if chunks == 1 and any(run.arguments.get(name) for name in _PERTURBING):
            yield ("perturbed",)
        if chunks == 1 and run.earlier and call.guidance and max(run.earlier) <= n_images:
            yield (_PASSES[len(run.earlier) % len(_PASSES)],)
        for name, layouts in _LAYOUTS.items():
            if chunks in layouts and any(re.search(name, cls.__name__) for cls in type(pipe).__mro__):
                if name == "PAG" and chunks == 2 and not pipe.do_perturbed_attention_guidance:
                    break  # perturbed guidance is off: the two chunks are the usual ones
                yield layouts[chunks]
        if chunks in _USUAL:
            yield _USUAL[chunks]
        if chunks == 2:  # where the text of one of them says so
            yield ("cond", "uncond")


def is_diffusers_own(pipe: Any) -> bool:
    """Whether the loop that runs is one of diffusers' own, and not a subclass's."""
    owners = (cls for cls in type(pipe).__mro__ if "__call__" in vars(cls) and "_sparsefeat_wiring" not in vars(cls))
    return next(owners, object).__module__.startswith("diffusers.")


def _agrees(entries: Entries, evidence: Sequence[Evidence]) -> bool:
    """Whether no entry's text says otherwise. Where there is a reference for a condition, its entries must have it."""
    for condition, image, seen in zip(*entries, evidence, strict=True):
        text = _TEXT_OF.get(condition, condition)
        if seen and (text not in seen or image not in seen[text]):
            return False
    return True


def _seen(evidence: Sequence[Evidence]) -> Entries | None:
    """The entries as their texts alone say, those of one text in the order of the images; None where a text is no
    reference's, or that of two conditions.
    """
    if not evidence or any(len(seen) != 1 for seen in evidence):
        return None
    used: dict[str, list[int]] = {}
    conditions, images = [], []
    for seen in evidence:
        ((condition, candidates),) = seen.items()
        taken = used.setdefault(condition, [])
        image = min(candidates, key=lambda i: (taken.count(i), i))
        taken.append(image)
        conditions.append(condition)
        images.append(image)
    return tuple(conditions), tuple(images)


def _texts(arguments: Mapping[str, Any], batch: int, references: list[Reference]) -> Iterator[list[torch.Tensor]]:
    """What among a model's arguments may be a batch of texts, as it is like a reference: one tensor for each entry, which
    may hold one for each of its frames. Sequences before pooled ones.
    """
    found = []
    for value in _flat(arguments.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == 1:
            value = value[:, 0]
        rows = rows_of_texts(value)
        if isinstance(value, torch.Tensor) and value.ndim == 3 and batch and value.shape[0] != batch:
            if value.shape[1] == batch:
                rows = list(value.transpose(0, 1))  # the sequence first
            elif value.shape[0] and value.shape[0] % batch == 0:
                rows = list(value.unflatten(0, (batch, -1)))  # a text for each frame
        if batch and len(rows) == batch and any(_overlap(rows[0], reference.tensor) for reference in references):
            found.append(rows)
    yield from sorted(found, key=lambda rows: -rows[0].ndim)


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _flat(value.values())
        else:
            yield value


def _key(rows: list[torch.Tensor]) -> tuple:
    """What is the same for tensors with the same contents in the same memory."""
    first = rows[0]
    ends = tuple((row.data_ptr(), row.shape, row.stride()) for row in (first, rows[-1]))
    version: Any = 0 if first.is_inference() else first._version
    if first.is_inference() and not _is_uncounted(first):  # the contents themselves, for which nothing has to wait
        version = tuple(float(row.sum()) for row in rows)
    return (*ends, len(rows), first.dtype, version)


def _is_uncounted(row: torch.Tensor) -> bool:
    """Whether nothing counts what is written in place, as under inference mode, and looking at it would wait."""
    return row.is_inference() and row.device.type != "cpu"


Pair = tuple[int, int, Reference, int]
"""Which of the arguments, which entry, the reference, and at how many positions they were compared."""


def _measure(texts: list[list[torch.Tensor]], references: list[Reference]) -> tuple[list[Pair], torch.Tensor]:
    """The distance of each entry's text to each reference that is like it: the pairs, and fp32 [pairs]."""
    pairs: list[Pair] = []
    distances: list[torch.Tensor] = []
    for argument, rows in enumerate(texts):
        for entry, row in enumerate(rows):
            for reference in references:
                length = _overlap(row, reference.tensor)
                if length:
                    pairs.append((argument, entry, reference, length))
                    distances.append(_distance(row, reference.tensor, length))
    device = distances[0].device if distances else None
    return pairs, torch.stack([d.to(device) for d in distances]) if distances else torch.zeros(0, dtype=torch.float32)


def _evidence(pairs: list[Pair], distances: list[float], batch: int) -> tuple[list[Evidence], tuple[int, ...]]:
    """What the argument says that tells the most entries apart, the first of equal ones; and which that is, if any does."""
    best: list[Evidence] = [{} for _ in range(batch)]
    decides: tuple[int, ...] = ()
    for argument in sorted({argument for argument, *_ in pairs}):
        found: list[Evidence] = [{} for _ in range(batch)]
        for entry in range(batch):
            mine = [(d, r, n) for (a, e, r, n), d in zip(pairs, distances, strict=True) if (a, e) == (argument, entry)]
            for reference in _nearest(mine):
                images = tuple(range(reference.image, reference.image + reference.images))
                found[entry][reference.condition] = (*found[entry].get(reference.condition, ()), *images)
        if sum(map(bool, found)) > sum(map(bool, best)):
            best, decides = found, (argument,)
    return best, decides


def _overlap(row: torch.Tensor, reference: torch.Tensor) -> int:
    """How many positions two texts can be compared at: one may be padded further than the other. A row of three axes is a
    text for each frame.
    """
    frames = row.ndim == 3 and reference.ndim == 2
    if not (frames or row.ndim == reference.ndim) or row.shape[-1] != reference.shape[-1]:
        return 0
    return 1 if row.ndim == 1 else min(row.shape[-2], len(reference))


def _distance(row: torch.Tensor, reference: torch.Tensor, length: int) -> torch.Tensor:
    """The largest difference over the largest value: fp32, 0-dim, on the row's device."""
    if row.ndim > 1:
        row, reference = row[..., :length, :], reference[:length]
    reference = reference.to(row.device)
    narrow = row.dtype if row.dtype.itemsize < reference.dtype.itemsize else reference.dtype
    row, reference = row.to(narrow).float(), reference.to(narrow).float()
    return (row - reference).abs().amax() / reference.abs().amax().clamp_min(1e-30).float()


def _nearest(measured: list[tuple[float, Reference, int]]) -> list[Reference]:
    exact = [(reference, length) for distance, reference, length in measured if distance == 0]
    if exact:
        longest = max(length for _, length in exact)
        return [reference for reference, length in exact if length == longest]
    if not measured:
        return []
    least, nearest, _ = min(measured, key=lambda m: m[0])
    others = [distance for distance, reference, _ in measured if reference.condition != nearest.condition]
    if least > _NEAR or any(distance < _APART * least for distance in others):
        return []
    return [reference for distance, reference, _ in measured if distance <= 2 * least]


def _in_turn(batch: int, n_images: int) -> tuple[int, ...]:
    return tuple(row % max(n_images, 1) for row in range(batch))


def outside_entries(batch: int) -> Entries:
    """The entries of a model that knows no condition, such as a VAE."""
    return ("cond",) * batch, tuple(range(batch))


def spread(entries: Entries, batch: int, attention: int = 0) -> Entries:
    """The same for a module inside that works on a multiple of the model's batch (frames folded into it), or on a part:
    perturbed-attention guidance attends for its perturbed entries apart, in the module's second `attention`; Kandinsky 5
    runs a text once for several videos, as the first of them.
    """
    conditions, images = entries
    if batch == len(conditions):
        return entries
    perturbed = [condition == "perturbed" for condition in conditions]
    if batch in (perturbed.count(False), perturbed.count(True)):
        wanted = perturbed.count(False) != batch or (attention > 0 and perturbed.count(True) == batch)
        rows = [row for row, is_perturbed in enumerate(perturbed) if is_perturbed is wanted]
        return tuple(conditions[row] for row in rows), tuple(images[row] for row in rows)
    times = batch // len(conditions) if conditions and batch % len(conditions) == 0 else 0
    if not times and batch and len(conditions) % batch == 0 and len(set(conditions)) == 1:
        each = len(conditions) // batch
        return conditions[::each], images[::each]
    if not times:
        raise ValueError(f"a block ran on {batch} batch entries inside a model that runs on {len(conditions)}")
    return tuple(c for c in conditions for _ in range(times)), tuple(i for i in images for _ in range(times))
