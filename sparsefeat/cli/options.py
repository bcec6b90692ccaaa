"""Options that several commands share, and what is checked of them while they are read."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.whole import as_path, check_writable

LARGEST = 3.4e38  # of 32-bit floats, which is what pipelines calculate with


def finite(number: float | None) -> float | None:
    """Typer callback: no NaN, and nothing that is infinite in 32 bits."""
    if number is not None and not abs(number) <= LARGEST:
        raise typer.BadParameter(f"{number} is not a finite number of 32 bits")
    return number


def eighths(pixels: int | None) -> int | None:
    """Typer callback: a side of an image that a VAE can make, which makes eight pixels of each of a latent's."""
    if pixels is not None and pixels % 8:
        raise typer.BadParameter(f"{pixels} is no multiple of 8")
    return pixels


def path(given: str | Path) -> Path:
    """Typer parser: an empty string names nothing, though pathlib takes it for the folder one is in."""
    try:
        return as_path(given, "it", "a folder or file")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def results_file(out: Path) -> None:
    """Refuse what no file can be written to, before anything is measured."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    check_writable(out, "--out")


class Section(str, Enum):
    """Of the score card: `sparsefeat.evaluation.card.SECTIONS`, known before anything is loaded."""

    erasers = "erasers"
    steerers = "steerers"
    maps = "maps"
    dictionaries = "dictionaries"
    attribution = "attribution"
    judges = "judges"


def work_folder(work: Path) -> None:
    """Refuse what parts cannot be kept in, before anything is measured."""
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; name a folder")


class Condition(str, Enum):
    cond = "cond"
    uncond = "uncond"
    both = "both"
    signed = "cond+uncond-"


Pipeline = Annotated[
    str | None,
    typer.Option(
        help="A diffusers folder or hub id, or joint: the embedded transformer. Default: the embedded UNet pipeline."
    ),
]
Saes = Annotated[list[str] | None, typer.Option("--sae", help="An SAE folder or hub id; may be given more than once.")]
Subfolders = Annotated[
    list[str] | None,
    typer.Option("--subfolder", help="The folder (or file) within it; give it once for each --sae, in their order."),
]
Subfolder = Annotated[str | None, typer.Option(help="The folder (or file) of the SAE within that.")]
Hookpoint = Annotated[
    str | None, typer.Option(help="Where the activations come from, in the place of what the file says.")
]
BaseModel = Annotated[str | None, typer.Option(help="Whose activations they are, in the place of what the file says.")]
K = Annotated[int | None, typer.Option(min=1, help="Active latents a row, where the file does not say.")]
At = Annotated[
    str | None, typer.Option(help="The hookpoint, `path[:output|input|diff][:text]`. Default: the SAE's own.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps. Default: 20 for the embedded pipelines, else 50.")
]
Guidance = Annotated[float | None, typer.Option(callback=finite, help="Guidance scale. Default: the pipeline's own.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
Out = Annotated[
    Path, typer.Option(parser=path, metavar="FOLDER", help="Folder for what is written; it must not exist yet.")
]
Results = Annotated[Path, typer.Option("--out", parser=path, metavar="FILE", help="Where the results go.")]
Work = Annotated[
    Path, typer.Option("--work", parser=path, metavar="FOLDER", help="Finished parts are kept here and gone on from.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document in the place of text.")]
