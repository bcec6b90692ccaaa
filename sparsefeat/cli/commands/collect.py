"""`sparsefeat collect`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.assets import emojicanvas
from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import PipelineChoice, check_hookpoint, is_embedded
from sparsefeat.cli.options import Device, Guidance, Pipeline, Seed, Steps, eighths, path
from sparsefeat.inputs import Inputs, read_images, read_prompts
from sparsefeat.whole import check_writable


class Rows(str, Enum):
    cond = "cond"
    uncond = "uncond"
    both = "both"
    all = "all"


class Precision(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


At = Annotated[
    list[str] | None,
    typer.Option(help="A hookpoint, `path[:output|input|diff][:text]`; may be given more than once."),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="A .txt, .csv, .tsv, .jsonl or .parquet file, or a data set of `datasets`. Default: the embedded pipeline's."
    ),
]
Column = Annotated[str | None, typer.Option(help="Where the prompts are. Default: prompt, caption or text.")]
Split = Annotated[str | None, typer.Option(help="Of the data set. Default: train.")]
Images = Annotated[
    str | None, typer.Option(metavar="FOLDER", help="Noise these images and look at them, in the place of drawing.")
]
Limit = Annotated[int | None, typer.Option(min=1, help="No more than the first so many prompts or images.")]
Batch = Annotated[int, typer.Option(min=1, help="Images a call of the pipeline.")]
RowsPerImage = Annotated[
    int, typer.Option(min=0, help="Positions kept of every image at every step, drawn by the seed; 0 keeps all.")
]
StepsPerImage = Annotated[
    int | None, typer.Option(min=1, help="Steps kept of every image, drawn by the seed. Default: all.")
]
Condition = Annotated[
    Rows, typer.Option(help="Whose rows under guidance; `all` also keeps those of which it is unknown.")
]
Height = Annotated[
    int | None,
    typer.Option(min=8, callback=eighths, help="Of the images; give both sides. Default: the pipeline's own."),
]
Width = Annotated[
    int | None,
    typer.Option(min=8, callback=eighths, help="Of the images; give both sides. Default: the pipeline's own."),
]


def collect(
    at: At = None,
    prompts: Prompts = None,
    column: Column = None,
    split: Split = None,
    images: Images = None,
    limit: Limit = None,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    height: Height = None,
    width: Width = None,
    batch: Batch = 4,
    rows_per_image: RowsPerImage = 64,
    steps_per_image: StepsPerImage = None,
    condition: Condition = Rows.cond,
    dtype: Annotated[Precision, typer.Option(help="What rows are kept in.")] = Precision.float16,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[
        Path,
        typer.Option(parser=path, metavar="FOLDER", help="For the rows; the same command goes on where one ended."),
    ] = Path("activations"),
) -> None:
    """Keep a pipeline's activations on disk, to train on. Killed at any moment, the same command goes on; under
    `torchrun` the ranks share the images."""
    at = check_hookpoints(at)
    choice = PipelineChoice(pipeline, device, steps)
    check_steps_per_image(steps_per_image, choice)
    inputs = read_inputs(prompts, column, split, images, limit, pipeline)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    check_writable(out, "--out")
    import torch

    from sparsefeat.training.activations.drawing import Drawing, collect_activations
    from sparsefeat.training.ranks import Ranks

    ranks = Ranks.of_environment()
    choice = PipelineChoice(pipeline, ranks.device(device), steps)
    call = choice.call_settings(guidance, height, width)
    with keeping(lambda: f"what is complete is in {out}, and the same command goes on from it"):
        stores = collect_activations(
            Drawing(choice.open(), inputs, batch, seed, call),
            at,
            out,
            rows_per_image=rows_per_image or None,
            steps_per_image=steps_per_image,
            condition=None if condition is Rows.all else condition.value,
            dtype=getattr(torch, dtype.value),
            base_model=choice.base_model,
            ranks=ranks,
        )
    if ranks.first:  # others may still be at it: ranks do not wait for one another
        so_far = " so far" if ranks.shared else ""
        for reader in stores.values():
            typer.echo(f"{reader.folder}: {reader.n_rows:,} rows of width {reader.schema['rows'].shape[0]}{so_far}")


def check_hookpoints(at: list[str] | None) -> list[str]:
    if not at:
        raise ValueError("--at is missing; name at least one hookpoint, as `sparsefeat hookpoints` lists them")
    for name in at:
        check_hookpoint(name)
    if len(set(at)) != len(at):
        raise ValueError("--at names a hookpoint twice; give each once")
    return at


def check_steps_per_image(kept: int | None, choice: PipelineChoice) -> None:
    if kept is not None and kept > choice.n_steps:
        raise ValueError(
            f"--steps-per-image {kept} is more than the {choice.n_steps} steps there are; leave it out for all"
        )


def read_inputs(
    prompts: str | None,
    column: str | None,
    split: str | None,
    images: str | None,
    limit: int | None,
    pipeline: str | None,
) -> Inputs:
    for name, given in (("--column", column), ("--split", split)):
        if given is not None and prompts is None:
            raise ValueError(f"{name} {given!r} is of --prompts, which is not given; leave it out")
    if images is not None:
        if prompts is not None:
            raise ValueError("--images and --prompts are both given; their captions stand with the images, give one")
        return read_images(images, limit)
    if prompts is not None:
        return read_prompts(prompts, column, split, limit)
    if not is_embedded(pipeline):
        raise ValueError("--prompts is missing; name a file of prompts for this pipeline, or --images")
    return Inputs(emojicanvas.training_prompts()[:limit])
