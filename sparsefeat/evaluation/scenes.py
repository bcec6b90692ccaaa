"""Heat maps as segmenters: EmojiScenes, whose masks are known, and generated pictures, which the pixel judge masks.

A *split* is a set of pictures: "real" scenes of held-out pairs, encoded, given noise and denoised in one pass; "generated"
ones, drawn from their captions. A *method* gives a map for each object's word; it is enlarged to the picture and scored by
`Segmentation` against the object's mask. The threshold is the one of a few that is best on other pictures (`fit`).

`oracle_miou` is what the exact mask scores, averaged to the map's grid and enlarged again: no map of that grid knows more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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

THRESHOLDS: tuple[Threshold, ...] = ("mean", 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
BATCH = 10
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
    reads the maps of that call; `batch`: of how many pictures at a time.
    """

    name: str
    opened: Callable[[Any, bool, Sequence[Picture]], Any]
    batch: int = BATCH


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


def heat_maps(kind: Any, refined: int = 0, exact: bool = False, late: str | None = None) -> Method:
    """`HeatMaps` of a kind, times the self-attention so often; `late`: both of the steps that LATE names alone."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        steps = None if late is None else LATE[late]
        maps, own = HeatMaps(kind, daam_exact=exact, steps=steps), SelfAttention(steps=steps)
        with attach(pipe, maps, *([own] if refined else [])) as run:

            def read(image: int, picture: Picture) -> Tensor:
                found = torch.stack([run[maps].word(word, image).values for word in picture.words])
                return run[own].propagate(found, image, refined) if refined else found

            yield read

    name = f"{kind} maps{', clamped as DAAM does' if exact else ''}{f' of the {late}' if late else ''}"
    return Method(f"{name}, refined {refined} x" if refined else name, opened)


def concepts() -> Method:
    """ConceptAttention's maps of a picture's objects and the background."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        maps = HeatMaps(concepts=[*pictures[0].words, "background"])
        with attach(pipe, maps) as run:
            yield lambda image, picture: torch.stack([run[maps].word(word, image).values for word in picture.words])

    return Method("concept maps", opened, batch=1)  # of the pictures of one call all concepts are the same


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

    return Method("DAAM, eager", opened)


def latents(name: str, sae: SAE, of_object: dict[int, int], at: Any = None) -> Method:
    """For each object the map of one latent; `latents_of_objects` chooses it."""

    @contextmanager
    def opened(pipe: Any, guidance: bool, pictures: Sequence[Picture]) -> Iterator[Maps]:
        record = Record(sae, at)
        with attach(pipe, record) as run:
            yield lambda image, picture: torch.stack([run[record].map(of_object[o], image) for o in picture.objects])

    return Method(name, opened)


def latents_of_objects(pipe: Any, sae: SAE, pictures: Sequence[Picture], at: Any = None) -> dict[int, int]:
    """The latent whose map correlates most with each object's mask, over real pictures that are not scored; `pipe` is
    `sparsefeat.pipeline.image_to_image`'s."""
    objects = sorted({index for picture in pictures for index in picture.objects})
    names = {index: emojicanvas.OBJECTS[index] for index in objects}
    found = WordCorrelations(sae.n_latents, list(names.values()))
    record = Record(sae, at)
    with attach(pipe, record) as run:
        for chunk in in_batches(pictures, BATCH):
            masks, _ = called(pipe, chunk)
            for image, (picture, own) in enumerate(zip(chunk, masks, strict=True)):
                found.add_maps(run[record], dict(zip((names[o] for o in picture.objects), own, strict=True)), image)
    best = {index: found.latents(name, 1) for index, name in names.items()}
    return {index: of[0].latent for index, of in best.items() if of}


# --------------------------------------------------------------------------------------------------------- the pictures


def called(pipe: Any, chunk: Sequence[Picture], judge: PixelJudge | None = None) -> tuple[list[Tensor], float]:
    """Call the pipeline on some pictures: their masks [objects, 64, 64], and the seconds of the call.

    Real pictures are denoised in one pass from a quarter of the schedule, without guidance (`pipe` is an image-to-image
    pipeline then); the others are drawn with the embedded pipelines' steps and guidance, and masked by the judge.
    """
    generators = [torch.Generator().manual_seed(picture.seed) for picture in chunk]
    prompts = [picture.prompt for picture in chunk]
    began = time.perf_counter()
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
    seconds = time.perf_counter() - began
    if judge is None:
        return [picture.masks for picture in chunk if picture.masks is not None], seconds
    labels = label_pixels(judge, drawn.float().cpu())
    masks = [torch.stack([seen == o for o in p.objects]).float() for p, seen in zip(chunk, labels, strict=True)]
    return masks, seconds


def in_batches(pictures: Sequence[Picture], size: int) -> list[Sequence[Picture]]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


# ------------------------------------------------------------------------------------------------------------ the table


def scored(
    pipe: Any, method: Method, pictures: Sequence[Picture], judge: PixelJudge | None
) -> tuple[Segmentation, Segmentation, float, int]:
    """The method's maps against the masks; the oracle's; seconds a picture, and pictures' objects that were not seen."""
    own, oracle = Segmentation(THRESHOLDS), Segmentation(THRESHOLDS)
    spent, unseen = 0.0, 0
    for chunk in in_batches(pictures, method.batch):
        with method.opened(pipe, judge is not None, chunk) as read:
            masks, seconds = called(pipe, chunk, judge)
            spent += seconds
            for image, (picture, truth) in enumerate(zip(chunk, masks, strict=True)):
                began = time.perf_counter()
                maps = read(image, picture)
                spent += time.perf_counter() - began
                grid = (int(maps.shape[-2]), int(maps.shape[-1]))
                large = F.interpolate(maps[None].float(), size=truth.shape[-2:], mode="bicubic")[0].clamp(min=0)
                for values, mask in zip(large, truth, strict=True):
                    if (mask > 0.5).float().mean() < LEAST_SEEN:
                        unseen += 1
                        continue
                    own.add(values, mask > 0.5)
                    oracle.add(downsampled_and_back(mask, grid).clamp(min=0), mask > 0.5)
    return own, oracle, spent / len(pictures), unseen


def row(
    pipe: Any,
    pipeline: str,
    method: Method,
    split: str,
    fit: Sequence[Picture],
    test: Sequence[Picture],
    judge: PixelJudge | None,
) -> dict[str, Any]:
    """One line of the table. Thresholds, the oracle's too, are chosen on `fit`; `fit_miou` and `fit_map` are of these
    pictures, by which one method may be chosen before others."""
    chosen, chosen_oracle, _, _ = scored(pipe, method, fit, judge)
    own, oracle, seconds, unseen = scored(pipe, method, test, judge)
    fitted = chosen.scores(chosen.best())
    scores, best = own.scores(chosen.best()), oracle.scores(chosen_oracle.best())
    within = own.intervals(chosen.best())

    def once() -> None:
        chunk = test[: method.batch]
        with method.opened(pipe, judge is not None, chunk) as read:
            called(pipe, chunk)
            for image, picture in enumerate(chunk):
                read(image, picture)

    return {
        "pipeline": pipeline,
        "method": method.name,
        "split": split,
        "miou": round(scores.miou, 4),
        "oracle_miou": round(best.miou, 4),
        "share_of_oracle": round(scores.miou / best.miou, 4),
        "accuracy": round(scores.accuracy, 4),
        "map": round(scores.map, 4),
        "pointing": round(scores.pointing, 4),
        **{f"{name}_ci": [round(end, 4) for end in ends] for name, ends in within.items()},
        "fit_miou": round(fitted.miou, 4),
        "fit_map": round(fitted.map, 4),
        "threshold": scores.threshold,
        "n_maps": scores.n,
        "not_seen": unseen,
        "seconds": round(seconds, 4),
        "peak_bytes": resident_peak_beyond(once),
    }
