"""`sparsefeat features`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.cli.drawing import draw
from sparsefeat.cli.opening import PipelineChoice, SAEChoice, check_hookpoint
from sparsefeat.cli.options import At, Device, Guidance, Json, Out, Pipeline, Saes, Seed, Steps, Subfolders
from sparsefeat.cli.outputs import print_json
from sparsefeat.whole import whole_folder


def features(
    prompt: str,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    top: Annotated[int, typer.Option(min=1, help="How many features.")] = 10,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("features"),
    as_json: Json = False,
) -> None:
    """Draw PROMPT and print the features that were most active, with a map of each over the image."""
    choice = PipelineChoice(pipeline, device, steps)
    saes = SAEChoice(sae, subfolder, pipeline, "attention")
    check_hookpoint(at)
    with whole_folder(out, "--out") as folder:
        from sparsefeat.features import Record
        from sparsefeat.pipeline import attach
        from sparsefeat.report import enlarge, overlay

        records = [Record(one, at) for one in saes.open(device)]
        pipe = choice.open()
        with attach(pipe, *records) as run:
            image = draw(pipe, prompt, choice.call_options(guidance, seed))
        enlarge(image).save(folder / "image.png")
        found: list[dict[str, Any]] = []
        for record in records:
            recording = run[record]
            for rank, latent in enumerate(recording.top(top)):
                name = f"{str(record.at).replace(':', '-')}-{rank:02d}-latent-{latent.latent}.png"
                if recording.grid is not None:
                    overlay(image, recording.map(latent.latent)).save(folder / name)
                shown = str(out / name) if recording.grid is not None else None
                found.append({"hookpoint": str(record.at), **latent._asdict(), "map": shown})
    if as_json:
        print_json({"prompt": prompt, "image": str(out / "image.png"), "features": found})
        return
    typer.echo(str(out / "image.png"))
    for record in records:
        typer.echo(f"{record.at}: latent, mean activation (over positions and steps), largest, share of positions")
        for one in found:
            if one["hookpoint"] == str(record.at):
                named = f"  {one['name']}" if one["name"] else ""
                numbers = f"{one['score']:10.4f} {one['maximum']:10.4f} {one['frequency']:8.2%}"
                typer.echo(f"{one['latent']:8d} {numbers}{named}")
