"""`sparsefeat features`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import PipelineChoice, SAEChoice, check_hookpoint
from sparsefeat.cli.options import At, Device, Guidance, Json, Out, Pipeline, Saes, Seed, Steps, Subfolders
from sparsefeat.cli.outputs import print_json
from sparsefeat.inputs import read_prompts
from sparsefeat.whole import check_free, check_writable, whole_folder

# What stands in a folder of pages: `sparsefeat.report.latents.pages.SETTINGS`, known without torch.
SETTINGS = "settings.json"


def features(
    prompt: Annotated[str | None, typer.Argument(help="What to draw. Without --page and --prompts.")] = None,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    top: Annotated[int | None, typer.Option(min=1, help="How many features. Default: 10.")] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Write pages of all latents: an index to search, and a page for each.")
    ] = False,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="In the place of PROMPT: a file of prompts, as `collect` reads them; their features are in features.csv. "
            "Of --page: what to draw. Default: the embedded pipeline's."
        ),
    ] = None,
    steer: Annotated[
        str | None, typer.Option(metavar="LATENTS", help="Of --page: also show what steering these does, as in 12,40.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Of --page: images a call. Default: 4.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("features"),
    as_json: Json = False,
) -> None:
    """Draw PROMPT and print the features that were most active, with a map of each over the image; or, with --page, write
    pages of all latents of an SAE (killed at any moment, the same command goes on)."""
    choice = PipelineChoice(pipeline, device, steps)
    saes = SAEChoice(sae, subfolder, pipeline, "attention")
    check_hookpoint(at)
    if page:
        if prompt is not None:
            raise ValueError(f"--page is of all latents and takes no PROMPT; name its folder with --out {prompt!r}")
        if top is not None:
            raise ValueError("--top is not of --page, which shows all latents; leave it out")
        if sae is not None and len(sae) > 1:
            raise ValueError("--sae was given more than once; the pages are of the latents of one SAE")
        latents = parse_latents(steer)
        write_pages(choice, saes, prompts, at, latents, batch or 4, seed, choice.call_settings(guidance), out, as_json)
        return
    of_page = {"--steer": steer, "--batch": batch}
    given = next((option for option, value in of_page.items() if value is not None), None)
    if given is not None:
        raise ValueError(f"{given} is of --page, which is not given; add it, or leave {given} out")
    if prompt is not None and prompts is not None:
        raise ValueError("--prompts is given beside PROMPT, which it takes the place of; leave one of them out")
    top = top or 10
    if prompts is not None:
        write_table(choice, saes, read_prompts(prompts).prompts, at, top, guidance, seed, out, as_json)
        return
    if prompt is None:
        raise ValueError(
            "PROMPT is missing; say what to draw, or add --page for pages of all latents, or --prompts for a table"
        )
    with whole_folder(out, "--out") as folder:
        from sparsefeat.features import Record
        from sparsefeat.pipeline import attach
        from sparsefeat.pipeline.drawing import draw
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


def write_table(
    choice: PipelineChoice,
    saes: SAEChoice,
    prompts: Sequence[str],
    at: str | None,
    top: int,
    guidance: float | None,
    seed: int,
    out: Path,
    as_json: bool,
) -> None:
    """`features.csv`, the top latents of every prompt, and the images."""
    with whole_folder(out, "--out") as folder:
        from sparsefeat.features import Record
        from sparsefeat.features.progress import progress_bar
        from sparsefeat.features.record import TopLatent
        from sparsefeat.pipeline import attach
        from sparsefeat.pipeline.drawing import draw
        from sparsefeat.report import enlarge

        records = [Record(one, at, positions=False) for one in saes.open(choice.device)]
        pipe = choice.open()
        lines: list[dict[str, Any]] = []
        with progress_bar(len(prompts), "drawing", "images") as bar:
            for number, prompt in enumerate(prompts):
                with attach(pipe, *records) as run:
                    image = draw(pipe, prompt, choice.call_options(guidance, seed))
                name = f"{number:04d}.png"
                enlarge(image).save(folder / name)
                said = {"prompt": prompt, "image": str(out / name)}
                lines += [
                    {**said, "hookpoint": str(record.at), **latent._asdict()}
                    for record in records
                    for latent in run[record].top(top)
                ]
                bar.update()
        with (folder / "features.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "image", "hookpoint", *TopLatent._fields])
            writer.writeheader()
            writer.writerows(lines)
    if as_json:
        print_json({"table": str(out / "features.csv"), "features": lines})
    else:
        typer.echo(f"{out / 'features.csv'}: the top {top} features of {len(prompts)} prompts, beside their images")


def parse_latents(given: str | None) -> list[int]:
    """`12,40` -> [12, 40]"""
    if given is None:
        return []
    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--steer {given!r} must be numbers of latents, as in --steer 12,40")
    return [int(part) for part in parts]


def write_pages(
    choice: PipelineChoice,
    saes: SAEChoice,
    prompts: str | None,
    at: str | None,
    steer: list[int],
    batch: int,
    seed: int,
    call: dict[str, Any],
    out: Path,
    as_json: bool,
) -> None:
    """The pages of one SAE's latents in `out`."""
    if prompts is None and choice.name is not None:
        raise ValueError("--prompts is missing; name a file of prompts for this pipeline, some hundred of them")
    given = None if prompts is None else read_prompts(prompts).prompts
    check_free(out, "--out", replace=SETTINGS)
    check_writable(out, "--out")
    from sparsefeat.measure.machine import draw_precision
    from sparsefeat.report.latents import unfinished_place, words_of, write_feature_pages

    if given is None:
        concepts: dict[str, tuple[str, ...]] = {
            canvas.prompt(o, s): (canvas.words(o), s) for s in canvas.STYLES for o in canvas.OBJECTS
        }
    else:
        concepts = words_of(given)
    place = unfinished_place(out)

    def kept() -> str:
        if place.is_dir():
            return f"what is finished is kept in {place}, and the same command goes on from it"
        return f"the pages are in {out}, and the same command goes on" if out.is_dir() else "nothing was written"

    with keeping(kept):
        sae = saes.open(choice.device)[0]
        during = draw_precision if choice.embedded else nullcontext
        index = write_feature_pages(
            out, choice.open(), sae, concepts, at=at, steer=steer, batch_size=batch, seed=seed, during=during, **call
        )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if as_json:
        print_json({"index": str(index), "latents": sae.n_latents, "bytes": size})
        return
    typer.echo(f"{index}: {sae.n_latents:,} latents, {size / 1e6:.1f} MB in all")
