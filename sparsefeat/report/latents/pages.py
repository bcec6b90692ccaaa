"""Pages of an SAE's latents, as Neuronpedia has them for language models: an index that can be searched and sorted, and a
page for each latent. Static files that open from a disk: no request, nothing from elsewhere.

    write_feature_pages("pages", pipe, sae, {"a fox": ["fox"], "an owl": ["owl"], ...})

| in the folder | is |
|---|---|
| `index.html` | the index |
| `latents/00012.html` | the page of latent 12 |
| `latents.jsonl` | every number on the pages, a line for each latent |
| `images/00003.webp` | image 3, which the pages share |
| `steered/`, `steering/` | what steering does: images, and what was done |
| `settings.json`, `data/` | what was drawn and counted, from which the same call goes on |

Nothing is computed for a page alone: a page is its line of `latents.jsonl`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from sparsefeat.arguments import wholes
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.features.chance import Namer, halves
from sparsefeat.features.progress import progress_bar
from sparsefeat.features.survey import Survey, nearest_by_decoder
from sparsefeat.pipeline import Hookpoint
from sparsefeat.report.latents.strips import steering_of, write_steering
from sparsefeat.report.latents.surveying import DATA, Drawn, picture_of
from sparsefeat.report.page import environment
from sparsefeat.sae import SAE
from sparsefeat.whole import as_path, check_free, check_writable, written_plainly

SETTINGS, LINES, INDEX = "settings.json", "latents.jsonl", "index.html"

# Concepts of a latent in the index and on its page.
N_CONCEPTS = 5


def write_feature_pages(
    folder: str | os.PathLike[str],
    pipe: Any,
    sae: SAE,
    prompts: Mapping[str, Sequence[str]],
    *,
    at: str | Hookpoint | None = None,
    steer: Sequence[int] = (),
    batch_size: int = 4,
    seed: int = 0,
    during: Callable[[], AbstractContextManager] = nullcontext,
    **call: Any,
) -> Path:
    """Draw an image of each prompt, and write the pages of all latents of an SAE into `folder`; its `index.html` is returned.

    Args:
        prompts: prompt -> its concepts, the words that a latent can be named by. A name stands on a page only where it
            beats the best of all words on shuffled images (`name_of`).
        at: hookpoint; default the SAE's.
        steer: latents whose page also shows what steering does; a second call may name more.
        batch_size: images a call of the pipeline; what is held in memory grows with it, not with the images.
        seed: image i starts from noise of `seed + i`.
        during: opens a context around each call of the pipeline, such as an autocast.
        call: arguments of the pipeline, such as num_inference_steps.

    `folder` is there once its pages are whole. Until then they are in a hidden folder beside it, `.NAME.unfinished`, and
    the same call goes on from what is finished there: the last batch of images, the last latent.

    Raises:
        FileExistsError: `folder` is there and holds something else, or pages of other prompts, weights or settings.
        ValueError: an argument cannot be, a latent of `steer` is active in no image.
    """
    drawn = Drawn(pipe, sae, prompts, hookpoint_of(sae, at), seed, batch_size, call, during)
    asked = wholes("steer", steer, 0, sae.n_latents - 1) if len(steer) else []
    settings = drawn.settings()
    target = as_path(folder)
    if not (target / SETTINGS).is_file():
        check_free(target)
        check_writable(target)
        place = unfinished_place(target)
        place.mkdir(parents=True, exist_ok=True)
        with written_plainly(target, unfinished=place):
            _check_settings(place, settings, "what is left there of an earlier run")
            _write_whole(place / SETTINGS, json.dumps(settings, indent=1))
            try:
                _write_pages(place, drawn, settings)
            except BaseException:
                if not (place / DATA / "survey.json").is_file():  # nothing is finished that could be gone on from
                    shutil.rmtree(place)
                raise
            check_free(target)  # again: minutes may have passed
            place.rename(target)
    _check_settings(target, settings, "the pages there")
    with written_plainly(target):
        for latent in write_steering(target, drawn, asked):
            line = next(line for line in read_lines(target) if line["latent"] == latent)
            _write_page(target, line, Survey.load(target / DATA), settings, labels(target))
    return target / INDEX


def unfinished_place(folder: Path) -> Path:
    """Where the pages are until they are whole."""
    return folder.parent / f".{folder.name}.unfinished"


def _check_settings(place: Path, settings: Mapping[str, Any], what: str) -> None:
    if not (place / SETTINGS).is_file():
        return
    earlier = json.loads((place / SETTINGS).read_text())
    mine = json.loads(json.dumps(settings))
    other = next((name for name in mine if earlier.get(name) != mine[name]), None)
    if other is not None:
        raise FileExistsError(
            f"folder {place} is of another run: {what} had {other} {earlier.get(other)}, this one has {mine[other]}; choose "
            "another folder, or delete that one"
        )


def _write_pages(place: Path, drawn: Drawn, settings: Mapping[str, Any]) -> None:
    survey = drawn.survey(place)
    write_lines(place, survey, drawn.sae)
    names = labels(place)
    (place / "latents").mkdir(exist_ok=True)
    for line in read_lines(place):
        if not (place / page_of(line["latent"])).is_file():
            _write_page(place, line, survey, settings, names)
    rows = [_row(line) for line in read_lines(place)]
    shown = environment().get_template("latents/index.html.jinja").render(settings=settings, rows=rows)
    _write_whole(place / INDEX, shown)


# What is said of each latent -----------------------------------------------------------------------------------------


def read_lines(place: Path) -> Iterator[dict[str, Any]]:
    """Of `latents.jsonl`, those that are whole."""
    path = place / LINES
    if path.is_file():
        with open(path, encoding="utf-8") as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def labels(place: Path) -> dict[int, str]:
    """What a latent is called: its name if it has one."""
    return {line["latent"]: name for line in read_lines(place) if (name := line["given_name"] or line["name"])}


def write_lines(place: Path, survey: Survey, sae: SAE) -> None:
    """Write `latents.jsonl`, or what is missing of it."""
    path = place / LINES
    whole_bytes = path.read_bytes() if path.is_file() else b""
    whole_bytes = whole_bytes[: whole_bytes.rfind(b"\n") + 1]  # a line that was cut off is made again
    done = whole_bytes.count(b"\n")
    with open(path, "wb") as file, progress_bar(sae.n_latents, "naming latents", "latents") as bar:
        file.write(whole_bytes)
        bar.update(done)
        for latent, line in enumerate(_lines(survey, sae, done), done):
            file.write(json.dumps({"latent": latent, **line}, ensure_ascii=False, allow_nan=False).encode() + b"\n")
            file.flush()
            bar.update(1)


def _lines(survey: Survey, sae: SAE, start: int) -> Iterator[dict[str, Any]]:
    examples = survey.examples
    words = list(dict.fromkeys(word for names in examples.concepts for word in names))
    areas = survey.areas(words)
    try:
        namer = Namer(examples.concepts, words, halves(examples.concepts))
    except ValueError:  # no word has images with it and without it in both halves
        namer = None
    density, mean_active = survey.density, survey.mean_active
    beside = zip(nearest_by_decoder(sae.W_dec), survey.companions(), strict=True)
    for latent, (nearest, together) in enumerate(beside):
        if latent < start:
            continue
        peaks = examples.peaks(latent)
        active = int((peaks != 0).sum())
        evidence, name = None, None
        if active and namer is not None:
            naming = namer.name(peaks)
            evidence, name = naming._asdict(), naming.word if naming.is_a_name else None
        best = sorted((-float(area), i) for i, area in enumerate(areas[latent]) if active and area > 0.5)[:N_CONCEPTS]
        edges, counts = survey.bars(latent)
        yield {
            "given_name": sae.names.get(latent),
            "name": name,
            "evidence": evidence,
            "density_share": float(density[latent]),
            "maximum": float(peaks.max()),
            "mean_active": float(mean_active[latent]),
            "n_images_active": active,
            "concepts": [{"word": words[i], "auc": -area} for area, i in best],
            "examples": [
                {"image": picture_of(e.image), "prompt": e.prompt, "score": e.score} for e in examples.of(latent)
            ],
            "nearest": [n._asdict() for n in nearest],
            "together": [
                {"latent": c.latent, "share": c.share, "base_share": c.base, "cosine": c.cosine} for c in together
            ],
            "curves": {"edges": edges, "counts": counts, "by_step": survey.by_step(latent).tolist()},
        }


def _row(line: Mapping[str, Any]) -> list[Any]:
    """Of the index, as its script reads it."""
    evidence = line["evidence"] or {}
    return [
        line["latent"],
        line["given_name"] or line["name"],
        evidence["auc"] if line["name"] and not line["given_name"] else None,
        line["density_share"],
        line["n_images_active"],
        line["maximum"],
        [[concept["word"], concept["auc"]] for concept in line["concepts"][:3]],
        [example["image"] for example in line["examples"][:4]],
    ]


# Pages ---------------------------------------------------------------------------------------------------------------


def page_of(latent: int) -> str:
    return f"latents/{latent:05d}.html"


def _write_page(
    place: Path, line: Mapping[str, Any], survey: Survey, settings: Mapping[str, Any], names: Mapping[int, str]
) -> None:
    latent = line["latent"]
    maps = [example.map for example in survey.examples.of(latent)]
    shown = (
        environment()
        .get_template("latents/latent.html.jinja")
        .render(
            line=line,
            maps=[_glow(values, max(float(m.max()) for m in maps)) for values in maps],
            flat=[values.tolist() if values.ndim == 1 else None for values in maps],
            settings=settings,
            names=names,
            page_of=lambda number: Path(page_of(number)).name,
            steering=steering_of(place, latent),
            rows_kept=survey.rows_kept,
        )
    )
    _write_whole(place / page_of(latent), shown)


def _glow(values: Tensor, largest: float) -> str | None:
    """A map [h, w] as a picture of its own few pixels, which the page lays over the image: from 0 to `largest`. None for what
    is no map of an image."""
    if values.ndim != 2:
        return None
    scaled = np.asarray(values / largest if largest > 0 else values * 0).clip(0, 1)
    colours = (matplotlib.colormaps["inferno"](scaled)[..., :3] * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
