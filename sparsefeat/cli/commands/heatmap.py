"""`sparsefeat heatmap`."""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Container
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

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
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="What to draw; of several, each has a folder of its own.")
    ],
    word: Annotated[list[str] | None, typer.Option(help="A word of the prompt; default each of them.")] = None,
    by: Annotated[
        By,
        typer.Option(
            help="Also a sheet of the plain maps over the steps, and a film of each word; or over the layers."
        ),
    ] = By.words,
    film: Annotated[Film, typer.Option(help="What a film over the steps is.")] = Film.gif,
    refine: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often a word's map goes through the image's self-attention; with it, and with --shares, words.png and the words' own pictures are of the last quarter of the steps.",
        ),
    ] = 0,
    shares: Annotated[
        bool,
        typer.Option(
            "--shares",
            help="Mark the words that --word names apart from one another and from the background; best with --refine 1.",
        ),
    ] = False,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("heatmaps"),
) -> None:
    """Draw PROMPT and, for each word, where the image attended to it: a picture each, and all of them in words.png."""
    choice = PipelineChoice(pipeline, device, steps)
    wanted = [words_wanted(prompt, word, prompts) for prompt in prompts]
    if shares and word is None:
        raise ValueError("--shares marks words apart that you name; add --word for each")
    if film is not Film.gif and by is not By.steps:
        raise ValueError(f"--film {film.value} is of the steps; add --by steps")
    if film is Film.mp4 and importlib.util.find_spec("imageio") is None:
        raise ValueError(
            "--film mp4 needs imageio and ffmpeg: pip install imageio imageio-ffmpeg, or leave it out for GIFs"
        )
    with whole_folder(out, "--out") as folder:
        pipe = choice.open()
        written: list[Path] = []
        for prompt, of_it in zip(prompts, wanted, strict=True):
            place = Path() if len(prompts) == 1 else Path(free_name(prompt, [path.parent.name for path in written], ""))
            (folder / place).mkdir(exist_ok=True)
            options = choice.call_options(guidance, seed)
            written += [
                place / name
                for name in write_maps(folder / place, pipe, prompt, of_it, options, by, film, refine, shares)
            ]
    for path in written:
        typer.echo(str(out / path))


def words_wanted(prompt: str, words: list[str] | None, prompts: list[str]) -> list[str] | None:
    """Those of the words that are in the prompt; None for all that it has."""
    if not prompt.strip():
        raise ValueError("PROMPT is empty; give one with the words to map")
    if words is None:
        return None
    for one in words:
        if not one.strip() or not any(one.casefold() in other.casefold() for other in prompts):
            raise ValueError(f"--word {one!r} is not in PROMPT {prompt!r}; name a word of it")
    found = [one for one in words if one.casefold() in prompt.casefold()]
    if not found:
        raise ValueError(f"no --word is in PROMPT {prompt!r}; name a word of each prompt")
    return found


def write_maps(
    folder: Path,
    pipe: Any,
    prompt: str,
    words: list[str] | None,
    options: dict[str, Any],
    by: By,
    film: Film,
    refine: int,
    shares: bool,
) -> list[str]:
    """Draw the prompt, write the pictures of its maps, and give their names."""
    from sparsefeat.attention import HeatMaps, SelfAttention, words_of
    from sparsefeat.pipeline import attach
    from sparsefeat.pipeline.drawing import draw
    from sparsefeat.report import enlarge, over_steps, overlay, save_animation, sheet_by, words_sheet

    last = max(1, options["num_inference_steps"] // 4)  # early steps blur a map
    late = (1 - last / options["num_inference_steps"], 1.0) if refine or shares else None
    maps, own = HeatMaps(steps=late), SelfAttention(steps=late)
    apart = maps if by is By.words else HeatMaps(keep=(by.value,))
    with attach(pipe, *dict.fromkeys([maps, apart, *([own] if refine else [])])) as run:
        image = draw(pipe, prompt, options)
    found = {}
    for one in words or dict.fromkeys(words_of(prompt)):
        try:
            found[one] = run[maps].word(one).values
        except ValueError as error:
            if words:  # asked for; of the others each that has no map is told
                raise
            typer.echo(f"no map: {in_options(str(error), {'word': '--word'})}", err=True)
    if not found:
        raise ValueError(f"PROMPT {prompt!r} has no word that this pipeline knows, so there is nothing to map")
    if shares:
        found = {heat.label: heat.values for heat in run[maps].shares(list(found))}
    if refine:
        found = {one: run[own].propagate(values, times=refine) for one, values in found.items()}
    names = {"image.png": enlarge(image), "words.png": words_sheet(image, found)}
    if by is not By.words:
        names[f"{by.value}.png"] = sheet_by(image, run[apart], list(found), "step" if by is By.steps else "layer")
    of_word: dict[str, str] = {}
    for one, values in found.items():
        of_word[one] = free_name(one, names)
        names[of_word[one]] = overlay(image, values)
    for name, picture in names.items():
        picture.save(folder / name)
    films = (
        {one: Path(name).with_suffix(f".{film.value}").name for one, name in of_word.items()} if by is By.steps else {}
    )
    for one, name in films.items():
        save_animation(over_steps(image, run[apart], one), folder / name)
    return [*names, *films.values()]


def free_name(word: str, taken: Container[str], ending: str = ".png") -> str:
    """`fox` -> fox.png, whatever the word holds; fox-2.png if that is taken."""
    stem = re.sub(r"[^\w'-]+", "-", word).strip("-")[:100] or "word"
    names = itertools.chain([f"{stem}{ending}"], (f"{stem}-{n}{ending}" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)
