"""`sparsefeat heatmap`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    with whole_folder(out, "--out") as folder:
        from sparsefeat.attention import HeatMaps
        from sparsefeat.pipeline import attach
        from sparsefeat.report import enlarge, overlay

        pipe = choice.open()
        maps = HeatMaps()
        with attach(pipe, maps) as run:
            image = pipe(prompt, **choice.call_options(guidance, seed)).images[0]
        words = word or list(dict.fromkeys(prompt.split()))
        found = {one: run[maps].word(one).values for one in words}
        enlarge(image).save(folder / "image.png")
        names = ["image.png"]
        for one, values in found.items():
            names.append(f"{one.strip('.,').replace('/', '-')}.png")
            overlay(image, values).save(folder / names[-1])
    for name in names:
        typer.echo(str(out / name))
