"""`sparsefeat train`."""

from __future__ import annotations

import re
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sparsefeat.cli.commands.collect import (
    Batch,
    Column,
    Condition,
    Height,
    Images,
    Limit,
    Prompts,
    Rows,
    RowsPerImage,
    Split,
    StepsPerImage,
    Width,
    check_hookpoints,
    check_steps_per_image,
    read_inputs,
)
from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import PipelineChoice, check_usable
from sparsefeat.cli.options import Device, Guidance, Pipeline, Seed, Steps, finite, path
from sparsefeat.disk import alone_in
from sparsefeat.whole import check_free, check_writable

if TYPE_CHECKING:
    from sparsefeat.training.activations.rows import SideBySide, Source

# Known without torch; those of `sparsefeat.training.PUBLISHED`.
PRESETS = (
    "topk",
    "multi-topk",
    "hierarchical-topk",
    "batch-topk",
    "matryoshka",
    "crosscoder",
    "sdxl-unbox",
    "saeuron",
    "concept-steerers",
    "itd",
    "flux-sae",
    "tide",
    "temporal-topk",
    "transcoder",
    "skip-transcoder",
    "relu-l1",
    "dn-cbm",
    "jumprelu",
    "jumprelu-tanh",
    "gated",
    "archetypal",
    "ra-sae",
    "itda",
)
# What --activations leave nothing to say of.
OF_DRAWING = (
    "prompts", "column", "split", "images", "limit", "pipeline", "steps", "guidance", "height", "width", "batch",
    "rows_per_image", "steps_per_image", "condition", "window",
)  # fmt: skip
SETTINGS = "train.json"
INPUT = re.compile(r":input(?=$|:)")
BUILT = "itda"
OF_GRADIENTS = (
    "lr",
    "warmup_steps",
    "decay_steps",
    "decay",
    "optimizer",
    "weight_decay",
    "ema",
    "precision",
    "accumulate",
    "start",
    "normalizer",
    "dead_after",
)
TRANSCODERS = ("transcoder", "skip-transcoder")


class Optimizer(str, Enum):
    adam = "adam"
    adamw = "adamw"


class Decay(str, Enum):
    linear = "linear"
    cosine = "cosine"


class Start(str, Enum):
    random = "random"
    rows = "rows"


class Precision(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Normalizer(str, Enum):
    none = "none"
    b_pre = "b_pre"
    standardize = "standardize"
    unit_norm = "unit_norm"
    constant_norm = "constant_norm"
    pca = "pca"
    affine = "affine"


def train(
    context: typer.Context,
    activations: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="What `sparsefeat collect` kept. Without it the pipeline draws while it trains."
        ),
    ] = None,
    at: Annotated[
        list[str] | None,
        typer.Option(help="A hookpoint; may be given more than once. Default: all that the activations are of."),
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(help="A published recipe, such as topk (the default); more than one trains each."),
    ] = None,
    latents: Annotated[int | None, typer.Option(min=1, help="Default: the preset's multiple of the width.")] = None,
    k: Annotated[int | None, typer.Option(min=1, help="Active latents a row. Default: the preset's.")] = None,
    normalizer: Annotated[Normalizer | None, typer.Option(help="Default: the preset's.")] = None,
    train_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps. Default: the preset's.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows a step, over all ranks. Default: the preset's.")
    ] = None,
    lr: Annotated[float | None, typer.Option(min=0, callback=finite, help="Its peak. Default: the preset's.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Steps over which lr rises.")] = None,
    decay_steps: Annotated[int | None, typer.Option(min=0, help="Steps over which lr falls to 0 at the end.")] = None,
    decay: Annotated[Decay | None, typer.Option(help="How it falls.")] = None,
    optimizer: Annotated[Optimizer | None, typer.Option(help="Default: adam.")] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, callback=finite, help="Of adamw.")] = None,
    ema: Annotated[
        float | None, typer.Option(callback=finite, help="Average the weights with this decay, such as 0.995.")
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the loss; weights are float32. Default: float32.")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Go through a batch in so many pieces.")] = None,
    start: Annotated[
        Start | None, typer.Option(help="Where directions begin; with rows of the data fewer latents die.")
    ] = None,
    dead_after: Annotated[
        int | None, typer.Option(min=1, help="Rows after which a latent that did not fire is dead.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="In steps.")] = 500,
    log_every: Annotated[int, typer.Option(min=1, help="In steps.")] = 50,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write for TensorBoard, which must be installed.")
    ] = False,
    window: Annotated[
        int, typer.Option(min=1, help="Images whose rows are shuffled among themselves, without --activations.")
    ] = 64,
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
    seed: Seed = 0,
    device: Device = "cpu",
    out: Annotated[
        Path,
        typer.Option(parser=path, metavar="FOLDER", help="For the SAEs; the same command goes on where one ended."),
    ] = Path("saes"),
) -> None:
    """Train SAEs on collected activations, or on what a pipeline draws meanwhile. Killed at any moment, the same command
    goes on; under `torchrun` the ranks share every batch."""
    presets = preset or ["topk"]
    check_presets(presets)
    transcoding = any(name in TRANSCODERS for name in presets)
    if transcoding:
        check_transcoders(presets, at)
    choice = PipelineChoice(pipeline, device, steps)
    check_settings(
        latents, k, train_steps, batch_size, lr, warmup_steps, decay_steps, optimizer, weight_decay, ema, accumulate
    )
    if activations is not None:
        check_collected(activations, context)
        inputs = None
    else:
        at = check_hookpoints(at)
        check_steps_per_image(steps_per_image, choice)
        inputs = read_inputs(prompts, column, split, images, limit, pipeline)
    changed: dict[str, Any] = {
        "n_latents": latents,
        "k": k,
        "steps": train_steps,
        "batch_size": batch_size,
        "lr": lr,
        "warmup_steps": warmup_steps,
        "decay_steps": decay_steps,
        "decay": decay and decay.value,
        "optimizer": optimizer and optimizer.value,
        "weight_decay": weight_decay,
        "ema": ema,
        "precision": precision and precision.value,
        "accumulate": accumulate,
        "start": start and start.value,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
        "sae": {"normalizer": normalizer.value} if normalizer else None,
        "objective": {"dead_after": dead_after} if dead_after else None,
    }
    settings = {name: given for name, given in changed.items() if given is not None}
    if all(name == BUILT for name in presets):
        check_built({**settings, "normalizer": normalizer, "dead_after": dead_after}, tensorboard)
    check_free(out, "--out", replace=SETTINGS)
    check_writable(out, "--out")
    from sparsefeat.report.training_page import write_training_page
    from sparsefeat.training import Drawing, PipelineRows, Ranks
    from sparsefeat.training.run.metrics import board_writer
    from sparsefeat.training.run.published import batch_size_of
    from sparsefeat.training.run.runs import fitting_batch_size, summaries, train_presets

    if tensorboard:
        board_writer()
    ranks = Ranks.of_environment()
    device = ranks.device(device)
    check_usable(device)
    alone = alone_in(out) if ranks.first else nullcontext()
    kept = keeping(lambda: f"checkpoints are in {out}, and the same command goes on from them")
    with alone, ranks.joined(device), kept:
        source: Source
        if inputs is None:
            stored, places, base_model = of_stores(Path(activations or "").expanduser(), at, transcoding)
            source, rows = stored, min(one.n_rows for one in stored.sources)
            usual = min(map(batch_size_of, presets))
            fitting = fitting_batch_size(rows, presets)
            if batch_size is None and fitting < usual:
                settings["batch_size"] = fitting
                if ranks.first:
                    typer.echo(f"--batch-size is {fitting:,}, not the preset's {usual:,}: there are {rows:,} rows")
        else:
            choice = PipelineChoice(pipeline, device, steps)
            drawing = Drawing(choice.open(), inputs, batch, seed, choice.call_settings(guidance, height, width))
            source = PipelineRows(
                drawing,
                at or [],
                window,
                rows_per_image=rows_per_image or None,
                steps_per_image=steps_per_image,
                condition=None if condition is Rows.all else condition.value,
                targets=[output_of(name) for name in at or []] if transcoding else (),
            )
            places, base_model = [str(hookpoint) for hookpoint in source.hookpoints], choice.base_model
        found = train_presets(
            source,
            places,
            presets,
            out,
            base_model=base_model,
            device=device,
            ranks=ranks,
            tensorboard=tensorboard,
            settings=settings,
        )
        if ranks.first:
            for line in summaries(found):
                typer.echo(line)
            typer.echo(f"the page: {write_training_page(out, {one.folder.name: one.entries for one in found})}")


def check_presets(presets: list[str]) -> None:
    for name in presets:
        if name not in PRESETS:
            raise ValueError(f"--preset {name!r} is not known; choose one of {', '.join(PRESETS)}")
    if len(set(presets)) != len(presets):
        raise ValueError("--preset names one twice; give each once")


def check_collected(activations: str, context: typer.Context) -> None:
    """Refuse what is of drawing beside rows that were drawn before, and a folder that is none."""
    said = next((name for name in OF_DRAWING if was_given(context, name)), None)
    if said is not None:
        option = f"--{said.replace('_', '-')}"
        raise ValueError(f"{option} is of drawing, and --activations were drawn before; give one of them")
    if not activations.strip() or not Path(activations).expanduser().is_dir():
        raise ValueError(f"--activations {activations!r} is no folder; name the one that `sparsefeat collect` wrote")


def check_built(given: dict[str, Any], tensorboard: bool) -> None:
    """Refuse what is of gradients where there are none."""
    said = [name for name in OF_GRADIENTS if given.get(name) is not None] + ["tensorboard"] * tensorboard
    if said:
        raise ValueError(
            f"--{said[0].replace('_', '-')} is of training by gradients, and {BUILT} is built of the rows in one pass; leave it out"
        )


def was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def check_settings(
    latents: int | None,
    k: int | None,
    train_steps: int | None,
    batch_size: int | None,
    lr: float | None,
    warmup_steps: int | None,
    decay_steps: int | None,
    optimizer: Optimizer | None,
    weight_decay: float | None,
    ema: float | None,
    accumulate: int | None,
) -> None:
    """What can be told of them without a preset, whose own they are beside otherwise."""
    for name, given, most_name, most in (
        ("--k", k, "--latents", latents),
        ("--warmup-steps", warmup_steps, "--train-steps", train_steps),
        ("--decay-steps", decay_steps, "--train-steps", train_steps),
        ("--accumulate", accumulate, "--batch-size", batch_size),
    ):
        if given is not None and most is not None and given > most:
            raise ValueError(f"{name} {given} is more than {most_name} {most}; take fewer")
    if lr == 0:
        raise ValueError("--lr 0 trains nothing; give a number above 0")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"--ema {ema} must be between 0 and 1, such as 0.995")
    if weight_decay and optimizer is not Optimizer.adamw:
        raise ValueError(f"--weight-decay {weight_decay} is of adamw; add --optimizer adamw, or leave it out")


def check_transcoders(presets: list[str], at: list[str] | None) -> None:
    other = next((name for name in presets if name not in TRANSCODERS), None)
    if other is not None:
        raise ValueError(
            f"--preset {other!r} is of rows alone, and a transcoder of a module's input and output; train apart"
        )
    for name in at or []:
        if not INPUT.search(name):
            raise ValueError(
                f"--at {name!r} must be a module's input for a transcoder, of which it makes the output; write PATH:input"
            )


def output_of(hookpoint: str) -> str:
    """Of the module whose input it is; an output is written without saying so."""
    return INPUT.sub("", hookpoint)


def of_stores(folder: Path, at: list[str] | None, transcoding: bool) -> tuple[SideBySide, list[str], str | None]:
    """The stores that `collect` wrote for these hookpoints, in their order, or for all; their hookpoints, and what they are of."""
    from sparsefeat.pipeline import Hookpoint
    from sparsefeat.store import ShardReader
    from sparsefeat.training.activations.rows import SideBySide, StoreRows

    readers = [ShardReader(one.parent) for one in sorted(folder.glob("*/manifest.json"))]
    by_name = {str(reader.metadata.get("hookpoint")): reader for reader in readers}
    if not by_name:
        raise ValueError(f"--activations {folder} has no activations; name the folder that `sparsefeat collect` wrote")
    chosen = (
        [str(Hookpoint.parse(name)) for name in at]
        if at
        else [n for n in by_name if not transcoding or INPUT.search(n)]
    )
    targets = [output_of(name) for name in chosen] if transcoding else []
    missing = [name for name in (*chosen, *targets) if name not in by_name]
    if missing:
        raise ValueError(f"--at {missing[0]!r} was not collected in {folder}, which has {', '.join(by_name)}")
    made = [by_name[name] for name in targets] if transcoding else [None] * len(chosen)
    if not chosen:
        raise ValueError(
            f"--activations {folder} has no module's input, which a transcoder needs; collect PATH:input and PATH"
        )
    sources = [StoreRows(by_name[name], target=target) for name, target in zip(chosen, made, strict=True)]
    return SideBySide(*sources), chosen, by_name[chosen[0]].metadata.get("base_model")
