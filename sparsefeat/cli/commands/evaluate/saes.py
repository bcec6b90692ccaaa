"""`sparsefeat evaluate saes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.assets import emojicanvas
from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import PipelineChoice, SAEChoice, check_hookpoint, is_embedded
from sparsefeat.cli.options import (
    Device,
    Guidance,
    Pipeline,
    Results,
    Saes,
    Seed,
    Steps,
    Subfolders,
    results_file,
)
from sparsefeat.evaluation.shared_words import shared_words
from sparsefeat.inputs import Inputs, read_prompts

EMBEDDED_OBJECTS = 25  # half of the embedded pipeline's, each in every style


def saes(
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: Annotated[str | None, typer.Option(help="The hookpoint of all of them, in the place of what they say.")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="As `sparsefeat collect` reads them. Default: half of the embedded pipeline's grid."),
    ] = None,
    column: Annotated[str | None, typer.Option(help="Where the prompts are. Default: prompt, caption or text.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="No more than the first so many prompts.")] = None,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    rows_per_image: Annotated[int, typer.Option(min=1, help="Positions of every image at every step.")] = 16,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Results = Path("saes.json"),
) -> None:
    """What SAEs are worth: reconstruction, concepts, what splicing them in costs, stability; beside neurons, PCA, random."""
    choice = PipelineChoice(pipeline, device, steps)
    asked = SAEChoice(sae, subfolder, pipeline)
    check_hookpoint(at)
    results_file(out)
    inputs = _inputs(prompts, column, limit, pipeline)
    shared_words(inputs.prompts)
    from sparsefeat.evaluation.evaluate_saes import Drawing, evaluate_saes
    from sparsefeat.whole import write_json

    opened = asked.open(device, hookpoint=at)
    pipe = choice.open()
    options = choice.call_options(guidance, seed)
    call: dict[str, Any] = {name: value for name, value in options.items() if name != "generator"}
    names = [Path(place).name for place in asked.places()]
    if len(set(names)) < len(names):
        names = list(asked.places())
    if len(set(names)) < len(names):
        names = [f"{place}/{inside}" for place, inside in zip(asked.places(), subfolder or names, strict=True)]
    with keeping(lambda: f"what was measured is in {out}"):
        found = evaluate_saes(
            pipe,
            dict(zip(names, opened, strict=True)),
            Drawing(inputs.prompts, seed, rows_per_image, call),
            on_part=lambda results: write_json(out, results),
        )
    for name, one in found["saes"].items():
        typer.echo(
            f"{name}: FVU {one['fvu']:.4f} (PCA {one['fvu_pca']:.4f}, random {one['fvu_random']:.4f}), L0 {one['l0']:.1f}, "
            f"dead {one['dead']:.1%}, probe {one['probe_1']:.3f}, named {one['named']:.1%}"
        )
    typer.echo(f"wrote {out}")


def _inputs(prompts: str | None, column: str | None, limit: int | None, pipeline: str | None) -> Inputs:
    if prompts is not None:
        return read_prompts(prompts, column, None, limit)
    if not is_embedded(pipeline):
        raise ValueError("--prompts is missing; name a file of prompts for this pipeline")
    grid = [emojicanvas.prompt(o, s) for o in emojicanvas.OBJECTS[:EMBEDDED_OBJECTS] for s in emojicanvas.STYLES]
    return Inputs(tuple(grid[:limit]))
