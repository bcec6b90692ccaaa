"""Heat maps as segmenters: EmojiScenes, whose masks are known, and generated pictures, which the pixel judge masks.

A *split* is a set of pictures: "real" scenes of held-out pairs, encoded, given noise and denoised in one pass; "generated"
ones, drawn from their captions. A *method* gives a map for each object's word; it is enlarged to the picture and scored by
`Segmentation` against the object's mask. The threshold is the one of a few that is best on other pictures (`fit`).

`oracle_miou` is what the exact mask scores, averaged to the map's grid and enlarged again: no map of that grid knows more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.assets.embedded import GUIDANCE, N_STEPS
from sparsefeat.attention import HeatMaps, SelfAttention
from sparsefeat.evaluation.eager_daam import EagerDAAM
from sparsefeat.evaluation.pixel_judge import PixelJudge, label_pixels
from sparsefeat.evaluation.segmentation import Segmentation, Threshold, downsampled_and_back
from sparsefeat.features import Record, WordCorrelations
from sparsefeat.measure.timing import resident_peak_beyond
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE

THRESHOLDS: tuple[Threshold, ...] = ("mean", *(n / 20 for n in range(2, 19)))
BATCH = 10
COSTED = 4
# Of how many steps the last one is run on a real picture: it is given the noise of a quarter of the schedule.
ONE_OF = 4
# Of the steps of a drawing, those that begin when most of the picture is settled.
LATE = {"last quarter": (0.75, 1.0), "last tenth": (0.9, 1.0)}
# A drawing in which the judge sees less of the object than this share of its pixels is not scored: it was not drawn.
LEAST_SEEN = 0.02


@dataclass(frozen=True)
class Picture:
    """What is asked for, and, of a real picture, what is there: masks float [objects, 64, 64]."""

    prompt: str
    objects: tuple[int, ...]
    seed: int
    image: Image.Image | None = None
    masks: Tensor | None = None

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(emojicanvas.words(emojicanvas.OBJECTS[index]) for index in self.objects)


Maps = Callable[[int, Picture], Tensor]
"""(image of the call, what it is of) -> [objects, h, w]."""


@dataclass(frozen=True)
class Method:
    """`opened(pipe, guidance, pictures)` is a context in which the pipeline is called on these pictures, and gives what
    reads the maps of that call; `batch`: of how many pictures at a time. `alone`: in calls of its own, not beside others.
    """

    name: str
    opened: Callable[[Any, bool, Sequence[Picture]], Any]
    batch: int = BATCH
    alone: bool = False


def real(n: int, split: str, seed: int = 0) -> list[Picture]:
    """EmojiScenes of pairs."""
    found = []
    for index, scene in enumerate(emojiscenes.scenes(n, seed, split, n_objects=(2,), related=0)):
        drawn = emojiscenes.draw(scene)
        masks = torch.from_numpy(drawn.masks)
        found.append(Picture(scene.caption, scene.objects, seed + index, Image.fromarray(drawn.image), masks))
    return found


def real_drawings() -> list[Picture]:
    """All drawings of EmojiCanvas, each object in each style."""
    canvas = emojicanvas.load()
    images, masks = canvas.on_white(), canvas.masks()
    return [
        Picture(
            emojicanvas.prompt(name, style),
            (o,),
            100 * s + o,
            Image.fromarray(images[s, o]),
            torch.from_numpy(masks[s, o : o + 1]),
        )
        for s, style in enumerate(emojicanvas.STYLES)
        for o, name in enumerate(emojicanvas.OBJECTS)
    ]


def generated(n: int, split: str, seed: int = 0) -> list[Picture]:
    """The captions of EmojiScenes of pairs."""
    scenes = emojiscenes.scenes(n, seed, split, n_objects=(2,), related=0)
    return [Picture(scene.caption, scene.objects, seed + index) for index, scene in enumerate(scenes)]


# ------------------------------------------------------------------------------------------------------- the methods


def nothing() -> Method:
    """No maps: what the call costs without them."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        yield lambda image, picture: torch.zeros(len(picture.objects), 1, 1)

    return Method("no maps", opened)


def chance(seed: int = 0) -> Method:
    """Numbers drawn at random on a grid of 16 x 16."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        generator = torch.Generator().manual_seed(seed)
        yield lambda image, picture: torch.rand(len(picture.objects), 16, 16, generator=generator)

    return Method("chance", opened)


def heat_maps(
    kind: Any, refined: int = 0, late: str | None = None, shares: bool = False, said: str = "", **options: Any
) -> Method:
    """`HeatMaps` of a kind, times the self-attention so often; `late`: both of the steps that LATE names alone; `shares`:
    the objects' words apart, as `HeatMapRecording.shares` tells them; `options` of `HeatMaps`, which the row calls `said`.
    """

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        steps = None if late is None else LATE[late]
        maps, own = HeatMaps(kind, steps=steps, **options), SelfAttention(steps=steps)
        with attach(pipe, maps, *([own] if refined else [])) as run:

            def read(image: int, picture: Picture) -> Tensor:
                words = picture.words
                of = run[maps].shares(words, image) if shares else [run[maps].word(word, image) for word in words]
                found = torch.stack([one.values for one in of])
                return run[own].propagate(found, image, refined) if refined else found

            yield read

    return Method(_called(f"{kind} maps", late, said, "shares" if shares else "", refined), opened)


def _called(what: str, late: str | None, *how: str | int) -> str:
    """`cross maps of the last quarter, shares, refined 1 x`"""
    parts = [f"refined {one} x" if isinstance(one, int) else one for one in how if one]
    return ", ".join([f"{what} of the {late}" if late else what, *parts])


def concepts() -> Method:
    """ConceptAttention's maps of a picture's objects and the background."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        maps = HeatMaps(concepts=[*pictures[0].words, "background"])
        with attach(pipe, maps) as run:
            yield lambda image, picture: torch.stack([run[maps].word(word, image).values for word in picture.words])

    return Method("concept maps", opened, batch=1, alone=True)  # of the pictures of one call all concepts are the same


def eager_daam() -> Method:
    """`EagerDAAM`, on a UNet."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        daam = EagerDAAM(guidance)

        def read(image: int, picture: Picture) -> Tensor:
            found = [daam.word(image, pipe.tokenizer, picture.prompt, word) for word in picture.words]
            return torch.stack(found)

        with daam.attached(pipe):
            yield read

    return Method("DAAM, eager", opened, alone=True)


def latents(
    name: str,
    sae: SAE,
    of_object: Mapping[int, Mapping[int, float]],
    at: Any = None,
    refined: int = 0,
    late: str | None = None,
) -> Method:
    """For each object the sum of the maps of its latents, by their weights; `latents_of_objects` chooses them. `refined` and
    `late` as of `heat_maps`."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        record, own = Record(sae, at), SelfAttention(steps=None if late is None else LATE[late])
        with attach(pipe, record, *([own] if refined else [])) as run:

            def read(image: int, picture: Picture) -> Tensor:
                steps = run[record].steps
                steps = steps if late is None else steps[round(LATE[late][0] * len(steps)) :]
                maps = [sum(run[record].heat(of_object[o], image, s).values for s in steps) for o in picture.objects]
                found = torch.stack(maps)
                return run[own].propagate(found, image, refined) if refined else found

            yield read

    return Method(_called(name, late, refined), opened)


def latents_of_objects(
    pipe: Any, sae: SAE, pictures: Sequence[Picture], n: int, at: Any = None
) -> dict[int, dict[int, float]]:
    """For each object the n latents whose maps correlate most with its word's heat map, and their correlations, over real
    pictures that are not scored, whose masks are not looked at; `pipe` is `sparsefeat.pipeline.image_to_image`'s."""
    names = {o: emojicanvas.words(emojicanvas.OBJECTS[o]) for picture in pictures for o in picture.objects}
    found = WordCorrelations(sae.n_latents, list(names.values()))
    record, maps = Record(sae, at), HeatMaps()
    with attach(pipe, record, maps) as run:
        for chunk in in_batches(pictures, BATCH):
            called(pipe, chunk)
            found.add(run[record], run[maps])
    return {o: dict(latents) for o, name in names.items() if (latents := found.latents(name, n))}


# --------------------------------------------------------------------------------------------------------- the pictures


def called(pipe: Any, chunk: Sequence[Picture], judge: PixelJudge | None = None) -> list[Tensor]:
    """Call the pipeline on some pictures: their masks [objects, 64, 64].

    Real pictures are denoised in one pass from a quarter of the schedule, without guidance (`pipe` is an image-to-image
    pipeline then); the others are drawn with the embedded pipelines' steps and guidance, and masked by the judge.
    """
    generators = [torch.Generator().manual_seed(picture.seed) for picture in chunk]
    prompts = [picture.prompt for picture in chunk]
    with torch.no_grad():
        if chunk[0].image is not None:
            options = {
                "image": [picture.image for picture in chunk],
                "strength": 1 / ONE_OF,
                "num_inference_steps": ONE_OF,
            }
            drawn = pipe(prompts, guidance_scale=1.0, generator=generators, output_type="latent", **options).images
        else:
            options = {"num_inference_steps": N_STEPS, "guidance_scale": GUIDANCE}
            drawn = pipe(prompts, generator=generators, output_type="pt", **options).images
    if judge is None:
        return [picture.masks for picture in chunk if picture.masks is not None]
    labels = label_pixels(judge, drawn.float().cpu())
    return [torch.stack([seen == o for o in p.objects]).float() for p, seen in zip(chunk, labels, strict=True)]


def in_batches(pictures: Sequence[Picture], size: int) -> list[Sequence[Picture]]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


# ------------------------------------------------------------------------------------------------------------ the table


@dataclass
class Counted:
    """One method's maps against the masks, the oracle's, and how many of the pictures' objects were not seen."""

    own: Segmentation
    oracle: Segmentation
    unseen: int = 0

    def add(self, maps: Tensor, masks: Tensor) -> None:
        large = F.interpolate(maps[None].float(), size=masks.shape[-2:], mode="bicubic")[0].clamp(min=0)
        for values, mask in zip(large, masks, strict=True):
            if (mask > 0.5).float().mean() < LEAST_SEEN:
                self.unseen += 1
                continue
            self.own.add(values, mask > 0.5)
            grid = (int(maps.shape[-2]), int(maps.shape[-1]))
            self.oracle.add(downsampled_and_back(mask, grid).clamp(min=0), mask > 0.5)


def counted(
    pipe: Any, methods: Sequence[Method], pictures: Sequence[Picture], judge: PixelJudge | None
) -> list[Counted]:
    """Of every method, all in the same calls of the pipeline."""
    found = [Counted(Segmentation(THRESHOLDS), Segmentation(THRESHOLDS)) for _ in methods]
    for chunk in in_batches(pictures, methods[0].batch):
        with ExitStack() as stack:
            reads = [stack.enter_context(method.opened(pipe, judge is not None, chunk)) for method in methods]
            for image, (picture, masks) in enumerate(zip(chunk, called(pipe, chunk, judge), strict=True)):
                for read, one in zip(reads, found, strict=True):
                    one.add(read(image, picture), masks)
    return found


def scores(
    pipe: Any, methods: Sequence[Method], fit: Sequence[Picture], test: Sequence[Picture], judge: PixelJudge | None
) -> list[dict[str, Any]]:
    """Of every method, a line of the table. Thresholds, the oracle's too, are chosen on `fit`; `fit_miou`,
    `fit_share_of_oracle` and `fit_map` are of these pictures, by which one method may be chosen before others."""
    chosen_of = counted(pipe, methods, fit, judge)
    return [_line(chosen, one) for chosen, one in zip(chosen_of, counted(pipe, methods, test, judge), strict=True)]


def _line(chosen: Counted, tested: Counted) -> dict[str, Any]:
    threshold, of_oracle = chosen.own.best(), chosen.oracle.best()
    own, oracle = tested.own.scores(threshold), tested.oracle.scores(of_oracle)
    fitted = chosen.own.scores(threshold)
    return {
        "miou": round(own.miou, 4),
        "oracle_miou": round(oracle.miou, 4),
        "share_of_oracle": round(own.miou / oracle.miou, 4),
        "accuracy": round(own.accuracy, 4),
        "map": round(own.map, 4),
        "pointing": round(own.pointing, 4),
        **{f"{name}_ci": [round(end, 4) for end in ends] for name, ends in tested.own.intervals(threshold).items()},
        "fit_miou": round(fitted.miou, 4),
        "fit_share_of_oracle": round(fitted.miou / chosen.oracle.scores(of_oracle).miou, 4),
        "fit_map": round(fitted.map, 4),
        "threshold": threshold,
        "n_maps": own.n,
        "not_seen": tested.unseen,
    }


def cost(pipe: Any, method: Method, pictures: Sequence[Picture], guidance: bool) -> dict[str, Any]:
    """Seconds of processor time of a picture, and the peak memory of COSTED pictures, with this method alone."""
    some, spent = pictures[:COSTED], 0.0

    def once() -> None:
        nonlocal spent
        began = time.process_time()
        for chunk in in_batches(some, method.batch):
            with method.opened(pipe, guidance, chunk) as read:
                called(pipe, chunk)
                for image, picture in enumerate(chunk):
                    read(image, picture)
        spent = time.process_time() - began

    peak = resident_peak_beyond(once)
    return {"seconds": round(spent / len(some), 4), "peak_bytes": peak}
