"""What the page does, without the page: draws, looks, edits, and keeps what was drawn."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from sparsefeat.arguments import number, whole
from sparsefeat.assets.embedded import ERASE_GAMMA, ERASE_LATENTS
from sparsefeat.attention import HeatMaps, words_of
from sparsefeat.attention.recording import HeatMapRecording
from sparsefeat.erasure import Erase, Exchange, TextEmbeddings
from sparsefeat.erasure.by_word import METHODS as WITHOUT_SAE
from sparsefeat.erasure.by_word import erase_by_word, texts_of
from sparsefeat.explore.edits import BY_SAE, Edit, Source, WordEdit, python_lines, save_edits
from sparsefeat.features import Examples, Record, Statistics, collect_statistics
from sparsefeat.features.record import Recording, TopLatent
from sparsefeat.pipeline import Call, Context, Instrument, attach
from sparsefeat.pipeline.call_arguments import check_number_of_steps
from sparsefeat.pipeline.drawing import draw_all
from sparsefeat.report import enlarge, overlay
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument

KEPT_RUNS = 8
"""Unedited runs that are kept, with their recordings: of the embedded pipeline 2 MiB each, of SDXL's SAEs 100 MiB."""
KEPT_EDITED = 32
"""Edited images that are kept: a slider that is let go and then confirmed, or brought back, draws nothing twice."""
EXAMPLES = 6
NAMED_FROM = 16
"""Images without which no word can pass `name_of`: half of them choose it and half try it."""
AT_ONCE = 4
"""Images of a survey that are drawn in one call, and lost if it is stopped."""
TEXTS_AT_ONCE = 25
"""Of those that an erasure reads."""

Progress = Callable[[str, int, int], None]
"""Told what is done, and how many of how many steps of it are."""


def untold(what: str, step: int, n_steps: int) -> None:
    """Nobody is told."""


class Stopped(Exception):
    """The user stopped a run. `step` of `n_steps` were done."""

    def __init__(self, step: int, n_steps: int):
        super().__init__(f"stopped after {step} of {n_steps} steps; everything is as it was before")
        self.step: int = step
        self.n_steps: int = n_steps


class Watch(Instrument):
    """Instrument: tells every completed step of the calls that draw `images` in all, and ends a call if it was stopped."""

    def __init__(self, what: str, progress: Progress, stop: threading.Event, images: int = 1):
        self.what: str = what
        self.progress: Progress = progress
        self.stop: threading.Event = stop
        self.images: int = images
        self.drawn: int = 0
        """Images of completed calls."""
        self._told = 0

    def begin_call(self, call: Call) -> None:
        self._now = call.n_images or 1
        self._tell(0, call.n_steps or 1)

    def end_step(self, context: Context) -> None:
        self._tell((context.step or 0) + 1, context.n_steps or 1)

    def end_call(self, call: Call) -> None:
        self.drawn += self._now

    def _tell(self, step: int, n_steps: int) -> None:
        done, of = self.drawn * n_steps + self._now * step, self.images * n_steps
        if done != self._told:
            self._told = done
            self.progress(self.what, done, of)
        if self.stop.is_set():
            raise Stopped(done, of)


@dataclass(frozen=True)
class Asked:
    """What an image is drawn from. guidance: None for the pipeline's own."""

    prompt: str
    seed: int = 0
    steps: int = 20
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; write what to draw")
        whole("seed", self.seed, 0, 2**63 - 1)
        whole("steps", self.steps)
        if self.guidance is not None:
            number("guidance", self.guidance)

    def settings(self) -> dict[str, Any]:
        """Arguments of the pipeline's call, but for the prompt and the noise."""
        own = {} if self.guidance is None else {"guidance_scale": float(self.guidance)}
        return {"num_inference_steps": self.steps, **own}

    def code(self) -> str:
        """The arguments of the call as they are written."""
        given = [f"{name}={value!r}" for name, value in self.settings().items()]
        noise = f'generator=torch.Generator("cpu").manual_seed({self.seed})'
        return ", ".join([repr(self.prompt), *given, noise])


class Feature(NamedTuple):
    """A latent in one image, with what is known of it.

    usual: what it is where it is active; usual_of: in which images that was seen. picture: its map over the image, or None
    for text, which has no place in it.
    """

    latent: int
    name: str | None
    score: float
    maximum: float
    frequency: float
    usual: float
    usual_of: str
    picture: Image.Image | None


class Shown(NamedTuple):
    """A picture with what is written under it."""

    picture: Image.Image
    caption: str


@dataclass(frozen=True, eq=False)
class Unedited:
    """A run without edits: its image, what each SAE read, and the words' maps, or the sentence why there are none."""

    asked: Asked
    image: Image.Image
    recordings: tuple[Recording, ...]
    maps: HeatMapRecording | None
    no_maps: str | None


class Explorer:
    """One pipeline with SAEs, and what was drawn with it. One run at a time: others wait.

    Args:
        pipe: any pipeline that `attach` takes and that draws images.
        saes: whose features are shown and steered.
        source: how these were opened, for the lines of Python.
        prompts: drawn by `survey`, to have images of other things.
        words: prompt -> the words it may name a latent by; of others, all their words.
        eraser: the text encoder's SAE that erases words, by one of `BY_SAE`; it needs `concepts`.
        concepts: a word -> concept -> prompts, of the word and of what is to stay; ValueError for a word it does not know.
    """

    def __init__(
        self,
        pipe: Any,
        saes: Sequence[SAE],
        source: Source,
        *,
        prompts: Sequence[str] = (),
        words: Mapping[str, Sequence[str]] | None = None,
        eraser: SAE | None = None,
        concepts: Callable[[str], Mapping[str, Sequence[str]]] | None = None,
    ):
        if not saes:
            raise ValueError("saes is empty; give at least one, whose features are looked at")
        attach(pipe, *(Record(sae) for sae in saes)).close()  # refuses those of other pipelines
        self.pipe: Any = pipe
        self.saes: tuple[SAE, ...] = tuple(saes)
        self.source: Source = source
        self.prompts: tuple[str, ...] = tuple(prompts)
        self.words: dict[str, Sequence[str]] = dict(words or {})
        self.eraser: SAE | None = eraser
        self.concepts: Callable[[str], Mapping[str, Sequence[str]]] | None = concepts
        self.methods: tuple[str, ...] = (
            *(BY_SAE if eraser is not None and concepts is not None else ()),
            *WITHOUT_SAE,
        )
        self.hookpoints: tuple[str, ...] = tuple(str(Record(sae).at) for sae in self.saes)
        self.examples: tuple[Examples, ...] = tuple(Examples(sae.n_latents, top=EXAMPLES) for sae in self.saes)
        self.pictures: list[Image.Image] = []
        """Of all images that are examples, in their order."""
        self.surveyed: int = 0
        self._seen: set[Asked] = set()
        self._runs: OrderedDict[Asked, Unedited] = OrderedDict()
        self._edited: OrderedDict[tuple[Any, ...], Image.Image] = OrderedDict()
        """By what they were drawn from, and the edits with what they were painted on."""
        self._fitted: dict[WordEdit, SavableInstrument] = {}
        self._texts: TextEmbeddings | None = None
        """What "uce" has read so far."""
        self._statistics: dict[tuple[str, ...], Statistics] = {}
        """By the concepts that they compare."""
        self._names: dict[tuple[int, int, int], str | None] = {}
        self._no_maps: str | None = None
        self._running, self._stop = threading.Lock(), threading.Event()

    def stop(self) -> None:
        """End the run that is going on, after its step. It raises `Stopped`, and nothing else changes."""
        if self._running.locked():
            self._stop.set()

    @contextmanager
    def _one_run(self) -> Iterator[None]:
        with self._running:
            self._stop.clear()
            yield

    def draw(self, asked: Asked, progress: Progress = untold) -> Unedited:
        """The image without edits and what is read in it; at once if it was drawn lately."""
        check_number_of_steps(self.pipe, "steps", asked.steps)
        with self._one_run():
            if asked in self._runs:
                self._runs.move_to_end(asked)
                return self._runs[asked]
            watch = Watch("drawing", progress, self._stop)
            images, recordings, maps = self._look(asked, [asked.prompt], [asked.seed], watch)
            drawn = Unedited(asked, images[0], recordings, maps, self._no_maps)
            _keep_last(self._runs, asked, drawn, KEPT_RUNS)
            if asked not in self._seen:
                self._seen.add(asked)
                self._keep(images, recordings, [asked.prompt])
            return drawn

    def _look(
        self, asked: Asked, prompts: list[str], seeds: list[int], watch: Watch
    ) -> tuple[list[Image.Image], tuple[Recording, ...], HeatMapRecording | None]:
        records = [Record(sae) for sae in self.saes]
        call = {**asked.settings(), "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds]}
        given: Any = prompts
        if len(prompts) == 1:
            given, call["generator"] = prompts[0], call["generator"][0]
        maps = None if self._no_maps or len(prompts) > 1 else HeatMaps()
        if maps is not None:
            try:
                return self._called(given, call, records, maps, watch)
            except (ValueError, RuntimeError) as error:  # it may be of the maps, and the records can do without
                call["generator"].manual_seed(seeds[0])
                watch.drawn = 0
                read = self._called(given, call, records, None, watch)
                self._no_maps = str(error)
                return read
        return self._called(given, call, records, None, watch)

    def _called(
        self, prompts: Any, call: dict[str, Any], records: Sequence[Record], maps: HeatMaps | None, watch: Watch
    ) -> tuple[list[Image.Image], tuple[Recording, ...], HeatMapRecording | None]:
        with attach(self.pipe, *records, *([] if maps is None else [maps]), watch) as run:
            images = draw_all(self.pipe, prompts, call)
        return images, tuple(run[record] for record in records), None if maps is None else run[maps]

    def _keep(self, images: Sequence[Image.Image], recordings: Sequence[Recording], prompts: Sequence[str]) -> None:
        """Take images into the examples of every SAE's latents."""
        words = [
            tuple(self.words.get(prompt) or dict.fromkeys(w.casefold() for w in words_of(prompt))) for prompt in prompts
        ]
        for examples, recording in zip(self.examples, recordings, strict=True):
            examples.add(recording, words)
        self.pictures += [enlarge(image) for image in images]

    def survey(self, n: int, asked: Asked, progress: Progress = untold) -> int:
        """Draw n more of `prompts`, with the steps and guidance of `asked`, for examples and names; how many there are.

        What was drawn before a stop is kept.
        """
        whole("n", n)
        if not self.prompts:
            raise ValueError("there are no prompts to draw examples of; start with --prompts FILE, a prompt a line")
        with self._one_run():
            watch = Watch("looking at other images", progress, self._stop, n)
            for start in range(0, n, AT_ONCE):
                numbers = range(self.surveyed, self.surveyed + min(AT_ONCE, n - start))
                prompts = [self.prompts[i % len(self.prompts)] for i in numbers]
                images, recordings, _ = self._look(asked, prompts, list(numbers), watch)
                self._keep(images, recordings, prompts)
                self.surveyed += len(prompts)
        return len(self.pictures)

    def features(self, drawn: Unedited, sae: int = 0, n: int = 12) -> list[Feature]:
        """The n latents that were most active in the image, with their maps."""
        return [self._feature(drawn, sae, top) for top in drawn.recordings[sae].top(n)]

    def feature(self, drawn: Unedited, sae: int, latent: int | str) -> Feature:
        """One latent, by its number or by what it is called."""
        text = str(latent).strip()
        if not text:
            raise ValueError("no latent is named; write its number or its name")
        if text.lstrip("+-").isdecimal():
            number_ = int(text)
            if not 0 <= number_ < self.saes[sae].n_latents:
                raise ValueError(f"latent {text} is not in this SAE, which has 0 to {self.saes[sae].n_latents - 1}")
        else:
            number_ = self._latent_called(sae, text)
        of_image = {top.latent: top for top in drawn.recordings[sae].top(self.saes[sae].n_latents)}
        absent = TopLatent(number_, 0.0, 0.0, 0.0, drawn.recordings[sae].names.get(number_))
        return self._feature(drawn, sae, of_image.get(number_, absent))

    def _latent_called(self, sae: int, text: str) -> int:
        """The latent of this name: of the SAE's own names, or of those that its examples gave."""
        if self.saes[sae].names:
            return self.saes[sae].names.find(text)
        given = {latent: name for (of, latent, _), name in self._names.items() if of == sae and name}
        for latent, name in given.items():
            if name.casefold() == text.casefold():
                return latent
        known = ", ".join(sorted(set(given.values()))) or "none yet: look at more images first"
        raise ValueError(f"no latent is called {text!r}; the names are {known}")

    def _feature(self, drawn: Unedited, sae: int, top: TopLatent) -> Feature:
        recording = drawn.recordings[sae]
        picture = None if recording.grid is None else overlay(drawn.image, recording.map(top.latent))
        usual, of = self._usual(recording, sae, top)
        name = top.name or self.name(sae, top.latent)
        return Feature(top.latent, name, top.score, top.maximum, top.frequency, usual, of, picture)

    def _usual(self, recording: Recording, sae: int, top: TopLatent) -> tuple[float, str]:
        if top.frequency > 0:
            return top.score / top.frequency, "its mean where it is active in this image"
        peaks = self.examples[sae].peaks(top.latent)
        if (peaks > 0).any():
            return float(peaks[peaks > 0].mean()), "its mean peak in other images, as it is not active in this one"
        active = recording.top(self.saes[sae].n_latents)
        mean = sum(t.score for t in active) / max(sum(t.frequency for t in active), 1e-12)
        return mean, "the mean of this SAE's active latents, as it was active in no image so far"

    def name(self, sae: int, latent: int) -> str | None:
        """The word that the images seen so far give a latent, if it is more than chance."""
        key = (sae, latent, len(self.pictures))
        if key not in self._names:
            found = None
            if len(self.pictures) >= NAMED_FROM:
                try:
                    naming = self.examples[sae].name(latent)
                    found = naming.word if naming.is_a_name else None
                except ValueError:  # no word has images with it and without it
                    found = None
            self._names[key] = found
        return self._names[key]

    def examples_of(self, sae: int, latent: int) -> list[Shown]:
        """The images seen so far that excite a latent most, with where it is active."""
        shown = []
        for example in self.examples[sae].of(latent):
            picture = self.pictures[example.image]
            mapped = overlay(picture, example.map) if example.map.ndim == 2 else picture
            shown.append(Shown(mapped, f"{example.prompt} · {example.score:.3g}"))
        return shown

    def word_maps(self, drawn: Unedited) -> list[Shown]:
        """The map of each word of the prompt over the image; ValueError where this pipeline's cannot be read."""
        if drawn.maps is None:
            raise ValueError(f"there are no heat maps of this pipeline: {drawn.no_maps}")
        shown = []
        for word in dict.fromkeys(words_of(drawn.asked.prompt)):
            try:
                shown.append(Shown(overlay(drawn.image, drawn.maps.word(word).values), word))
            except ValueError:  # the tokenizer has no such word, or cut it off
                continue
        return shown

    def edited(self, asked: Asked, edits: Sequence[Edit], progress: Progress = untold) -> Image.Image:
        """The image of the same prompt and noise with the edits at work; at once if it was drawn lately."""
        check_number_of_steps(self.pipe, "steps", asked.steps)
        for edit in edits:
            steps = getattr(edit, "steps", None)
            if steps is not None and steps[0] > asked.steps:
                raise ValueError(f"the edit begins at step {steps[0]} of {asked.steps}; choose an earlier first step")
        masks = [getattr(edit, "mask", None) for edit in edits]
        key = (asked, *edits, *(mask and (mask.mode, mask.size, mask.tobytes()) for mask in masks))
        with self._one_run():
            if key not in self._edited:
                instruments = self._instruments(edits, asked, progress)
                with attach(self.pipe, *instruments, Watch("editing", progress, self._stop)):
                    generator = torch.Generator("cpu").manual_seed(asked.seed)
                    images = draw_all(self.pipe, asked.prompt, {**asked.settings(), "generator": generator})
                _keep_last(self._edited, key, images[0], KEPT_EDITED)
            self._edited.move_to_end(key)
            return self._edited[key]

    def _instruments(self, edits: Sequence[Edit], asked: Asked, progress: Progress) -> list[SavableInstrument]:
        return [edit.instrument(self.saes, lambda word: self._erasure(word, asked, progress)) for edit in edits]

    def _erasure(self, edit: WordEdit, asked: Asked, progress: Progress) -> SavableInstrument:
        """The fitted erasure of a word; kept, so that it is fitted once, with what was read for it and serves other words."""
        if edit not in self._fitted:
            word = edit.word.strip()
            if not word:
                raise ValueError("no word is named; write what to erase, such as fox")
            if edit.method not in self.methods:
                raise ValueError(
                    f"method {edit.method!r} is not among those of this pipeline, {', '.join(self.methods)}"
                )
            known = None if self.concepts is None else self.concepts(word)
            self._fitted[edit] = self._fit(word, edit.method, known, asked.settings(), progress)
        return self._fitted[edit]

    def _fit(
        self,
        word: str,
        method: str,
        known: Mapping[str, Sequence[str]] | None,
        call: dict[str, Any],
        progress: Progress,
    ) -> SavableInstrument:
        def watch(n: int) -> Watch:
            return Watch(f"learning what “{word}” is", progress, self._stop, n)

        once = {**call, "num_inference_steps": 1}
        if method in BY_SAE:
            assert self.eraser is not None
            assert known is not None
            if method == "exchange":
                return Exchange.fit(self.pipe, self.eraser, word, known, n_latents=ERASE_LATENTS)
            if tuple(known) not in self._statistics:
                with attach(self.pipe, watch(len({prompt for of in known.values() for prompt in of}))):
                    self._statistics[tuple(known)] = collect_statistics(
                        self.pipe, self.eraser, known, batch_size=TEXTS_AT_ONCE, **once
                    )
            return Erase.from_statistics(
                self.eraser, self._statistics[tuple(known)], word, n_latents=ERASE_LATENTS, gamma=ERASE_GAMMA, magnitude="scale"
            )  # fmt: skip
        if method == "uce" and self._texts is None:
            self._texts = TextEmbeddings(self.pipe, **once)
        own, others = texts_of(word, known)
        n = len(self._texts.new([*own, *others, ""])) if method == "uce" and self._texts is not None else len(own)
        with attach(self.pipe, watch(n)):
            return erase_by_word(self.pipe, word, method, known, self._texts, **call)

    def lines(self, asked: Asked, edits: Sequence[Edit], folder: str, *, loaded: bool = False) -> str:
        """The program that draws the edited image; `loaded`: with all edits from the folder that `save` wrote."""
        return python_lines(self.source, edits, folder, asked.code(), loaded)

    def save(self, folder: str, asked: Asked, edits: Sequence[Edit]) -> Path:
        """Write the edits for `load_instrument(folder)`, with the program in `edit.py`."""
        place = Path(folder).expanduser().absolute() if str(folder).strip() else folder
        with self._one_run():
            instruments = self._instruments(edits, asked, untold)
        return save_edits(place, edits, instruments, self.lines(asked, edits, str(place)))


def _keep_last(kept: OrderedDict[Any, Any], key: Any, made: Any, n: int) -> None:
    """Keep `made`, and of all that is kept the n that were asked for last."""
    kept[key] = made
    while len(kept) > n:
        kept.popitem(last=False)
