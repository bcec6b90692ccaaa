"""`sparsefeat heatmap`."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Container
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.failures import in_options
from sparsefeat.cli.opening import PipelineChoice
from sparsefeat.cli.options import Device, Guidance, Out, Pipeline, Seed, Steps
from sparsefeat.whole import whole_folder


class By(str, Enum):
    words = "words"
    steps = "steps"
    layers = "layers"


class Film(str, Enum):
    gif = "gif"
    mp4 = "mp4"


def heatmap(
    prompt: str,
    word: Annotated[list[str] | None, typer.Option(help="A word of the prompt; default each of them.")] = None,
    by: Annotated[
        By, typer.Option(help="Also a sheet over the steps, and a film of each word; or over the layers.")
    ] = By.words,
    film: Annotated[Film, typer.Option(help="What a film over the steps is.")] = Film.gif,
    refine: Annotated[
        int, typer.Option(min=0, help="How often a word's map goes through the image's self-attention.")
    ] = 0,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("heatmaps"),
) -> None:
    """Draw PROMPT and, for each word, where the image attended to it: a picture each, and all of them in words.png."""
    choice = PipelineChoice(pipeline, device, steps)
    if not prompt.strip():
        raise ValueError("PROMPT is empty; give one with the words to map")
    missing = [one for one in word or [] if not one.strip() or one.casefold() not in prompt.casefold()]
    if missing:
        raise ValueError(f"--word {missing[0]!r} is not in PROMPT {prompt!r}; name a word of it")
    if film is not Film.gif and by is not By.steps:
        raise ValueError(f"--film {film.value} is of the steps; add --by steps")
    if film is Film.mp4 and importlib.util.find_spec("imageio") is None:
        raise ValueError(
            "--film mp4 needs imageio and ffmpeg: pip install imageio imageio-ffmpeg, or leave it out for GIFs"
        )
    with whole_folder(out, "--out") as folder:
        from sparsefeat.attention import HeatMaps, SelfAttention, words_of
        from sparsefeat.pipeline import attach
        from sparsefeat.pipeline.drawing import draw
        from sparsefeat.report import enlarge, over_steps, overlay, save_animation, sheet_by, words_sheet

        pipe = choice.open()
        maps = HeatMaps(keep=() if by is By.words else (by.value,))
        own = SelfAttention()
        with attach(pipe, maps, *([own] if refine else [])) as run:
            image = draw(pipe, prompt, choice.call_options(guidance, seed))
        found = {}
        for one in word or dict.fromkeys(words_of(prompt)):
            try:
                values = run[maps].word(one).values
            except ValueError as error:
                if word:  # asked for; of the others each that has no map is told
                    raise
                typer.echo(f"no map: {in_options(str(error), {'word': '--word'})}", err=True)
                continue
            found[one] = run[own].propagate(values, times=refine) if refine else values
        if not found:
            raise ValueError(f"PROMPT {prompt!r} has no word that this pipeline knows, so there is nothing to map")
        names = {"image.png": enlarge(image), "words.png": words_sheet(image, found)}
        if by is not By.words:
            names[f"{by.value}.png"] = sheet_by(image, run[maps], list(found), "step" if by is By.steps else "layer")
        of_word: dict[str, str] = {}
        for one, values in found.items():
            of_word[one] = free_name(one, names)
            names[of_word[one]] = overlay(image, values)
        for name, picture in names.items():
            picture.save(folder / name)
        films = {one: Path(name).with_suffix(f".{film.value}").name for one, name in of_word.items()}
        if by is By.steps:
            for one, name in films.items():
                save_animation(over_steps(image, run[maps], one), folder / name)
    for name in (*names, *(films.values() if by is By.steps else ())):
        typer.echo(str(out / name))


def free_name(word: str, taken: Container[str]) -> str:
    """`fox` -> fox.png, whatever the word holds; fox-2.png if that is taken."""
    stem = re.sub(r"[^\w'-]+", "-", word).strip("-") or "word"
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{n}.png" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)
