"""`sparsefeat heatmap`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Container
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.drawing import draw
from sparsefeat.cli.failures import in_options
from sparsefeat.cli.opening import PipelineChoice
from sparsefeat.cli.options import Device, Guidance, Out, Pipeline, Seed, Steps
from sparsefeat.whole import whole_folder


def heatmap(
    prompt: str,
    word: Annotated[list[str] | None, typer.Option(help="A word of the prompt; default each of them.")] = None,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("heatmaps"),
) -> None:
    """Draw PROMPT and, for each word, where the image attended to it."""
    choice = PipelineChoice(pipeline, device, steps)
    if not prompt.strip():
        raise ValueError("PROMPT is empty; give one with the words to map")
    missing = [one for one in word or [] if not one.strip() or one.casefold() not in prompt.casefold()]
    if missing:
        raise ValueError(f"--word {missing[0]!r} is not in PROMPT {prompt!r}; name a word of it")
    with whole_folder(out, "--out") as folder:
        from sparsefeat.attention import HeatMaps, words_of
        from sparsefeat.pipeline import attach
        from sparsefeat.report import enlarge, overlay

        pipe = choice.open()
        maps = HeatMaps()
        with attach(pipe, maps) as run:
            image = draw(pipe, prompt, choice.call_options(guidance, seed))
        found = {}
        for one in word or dict.fromkeys(words_of(prompt)):
            try:
                found[one] = run[maps].word(one).values
            except ValueError as error:
                if word:  # asked for; of the others each that has no map is told
                    raise
                typer.echo(f"no map: {in_options(str(error), {'word': '--word'})}", err=True)
        if not found:
            raise ValueError(f"PROMPT {prompt!r} has no word that this pipeline knows, so there is nothing to map")
        names = {"image.png": enlarge(image)}
        for one, values in found.items():
            names[free_name(one, names)] = overlay(image, values)
        for name, picture in names.items():
            picture.save(folder / name)
    for name in names:
        typer.echo(str(out / name))


def free_name(word: str, taken: Container[str]) -> str:
    """`fox` -> fox.png, whatever the word holds; fox-2.png if that is taken."""
    stem = re.sub(r"[^\w'-]+", "-", word).strip("-") or "word"
    names = itertools.chain([f"{stem}.png"], (f"{stem}-{n}.png" for n in itertools.count(2)))
    return next(name for name in names if name not in taken)
