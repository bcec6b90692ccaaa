"""`sparsefeat sae verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.opening import PipelineChoice
from sparsefeat.cli.options import Device, Json, Pipeline, path
from sparsefeat.cli.outputs import print_json

# Measured L0 may be this many times the published one, or a part of it as small: prompts differ from a training set.
AGREES = 2.0


def verify(
    name: Annotated[str, typer.Argument(help="A name that `sparsefeat sae list` prints.")],
    prompts: Annotated[list[str], typer.Argument(help="A few prompts of the kind the SAE was trained on.")],
    weights: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="PATH", help="Where its files lie. Default: fetched from the hub."),
    ] = None,
    pipeline: Pipeline = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each prompt.")] = 4,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure a published SAE on its pipeline beside what was published of it: exit code 1 if they do not agree."""
    choice = PipelineChoice(pipeline, device, steps)
    if weights is not None and not weights.exists():
        raise ValueError(
            f"--weights {str(weights)!r} does not exist; name its folder or file, or leave it out for the hub's"
        )
    from sparsefeat.sae.published import published

    entry = published(name)
    if entry is None:
        raise ValueError(f"{name!r} is not in the table of published SAEs: `sparsefeat sae list` prints it")
    import warnings

    from sparsefeat.evaluation.check import CheckWarning, check
    from sparsefeat.sae import load_sae

    source: str | Path = name if weights is None else weights
    sae = load_sae(source, device=device, hookpoint=entry.hookpoint, base_model=entry.base_model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckWarning)  # its sentence is printed
        result = check(sae, choice.open(), prompts, num_inference_steps=steps)
    quality = result.quality
    as_published = entry.l0 is None or entry.l0 / AGREES <= quality.l0 <= entry.l0 * AGREES
    agrees = bool(result) and as_published
    told = {
        "name": name,
        "hookpoint": str(result.hookpoint),
        "measured": {key: getattr(quality, key) for key in ("rows", "fvu", "l0", "dead")},
        "published": {"l0": entry.l0},
        "agrees": agrees,
        "problem": result.problem,
    }
    if as_json:
        print_json(told)
    else:
        typer.echo(f"{name} at {result.hookpoint}: {quality}")
        typer.echo(f"published: L0 {'not known' if entry.l0 is None else f'{entry.l0:g}'}; licence: {entry.licence}")
        if not as_published:
            typer.echo(f"L0 is {quality.l0:.3g}, not within a factor of {AGREES:g} of what was published")
        typer.echo(result.problem or ("They agree." if agrees else "They do not agree."))
    if not agrees:
        raise typer.Exit(1)
