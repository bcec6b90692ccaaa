"""`sparsefeat sae convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.opening import SAEChoice, check_hookpoint
from sparsefeat.cli.options import BaseModel, Hookpoint, K, Subfolder, path
from sparsefeat.whole import check_free, check_writable

# `sparsefeat.sae.convert.writable()`, known without torch.
FORMATS = ("sparsefeat", "sparsify", "sae_lens", "unbox", "openai", "dictionary_learning", "itda")


def convert(
    source: Annotated[str, typer.Argument(help="An SAE folder, file or hub id, in any format that can be read.")],
    target: Annotated[
        Path,
        typer.Argument(parser=path, metavar="TARGET", help="The folder to write; it must not exist yet, or be empty."),
    ],
    format_: Annotated[str, typer.Option("--format", help=f"Whose format: {', '.join(FORMATS)}.")] = "sparsefeat",
    subfolder: Subfolder = None,
    k: K = None,
    hookpoint: Hookpoint = None,
    base_model: BaseModel = None,
) -> None:
    """Read an SAE of any format that is known and write it in another."""
    if format_ not in FORMATS:
        raise ValueError(f"--format {format_!r} cannot be written; choose one of {', '.join(FORMATS)}")
    choice = SAEChoice([source], [subfolder] if subfolder else None, option="SOURCE")
    check_hookpoint(hookpoint, "--hookpoint")
    check_free(target, "TARGET")
    check_writable(target, "TARGET")
    from sparsefeat.sae.convert import convert as convert_sae

    sae = choice.open(k=k, hookpoint=hookpoint, base_model=base_model)[0]
    done = convert_sae(sae, target, format_)
    typer.echo(f"wrote {done.folder} ({format_})")
    typer.echo(f"read back: reconstructions of standard normal rows differ by at most {done.difference:.1e}")
    for name in done.lost:
        typer.echo(f"not kept by the format: {name}")
