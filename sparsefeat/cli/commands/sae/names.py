"""`sparsefeat sae names`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.options import Json, path
from sparsefeat.cli.outputs import print_json


def names(
    folder: Annotated[Path, typer.Argument(parser=path, metavar="FOLDER", help="The folder of an SAE.")],
    file: Annotated[
        Path | None,
        typer.Argument(
            parser=path, metavar="FILE", help="Names to give it: JSON, CSV, or a Neuronpedia export (.jsonl.gz)."
        ),
    ] = None,
    find: Annotated[str | None, typer.Option(help="Print the latent that is called so.")] = None,
    as_json: Json = False,
) -> None:
    """Give the latents of an SAE names, or print those they have."""
    from sparsefeat.sae import Names, load_sae
    from sparsefeat.sae.module import NAMES

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name that of an SAE")
    if file is not None:
        if find is not None:
            raise ValueError("--find is of the names that an SAE has, and FILE gives it others; leave one of them out")
        given = Names.read(file)
        n_latents = load_sae(folder).n_latents
        beyond = [latent for latent in given if not 0 <= latent < n_latents]
        if beyond:
            raise ValueError(
                f"{file} names latent {beyond[0]}, and the SAE has {n_latents}: they do not belong together"
            )
        given.write(folder / NAMES)
        if as_json:
            print_json({str(latent): name for latent, name in given.items()})
            return
        typer.echo(f"wrote {folder / NAMES}: names of {len(given)} of {n_latents} latents")
        return
    known = Names.read(folder / NAMES) if (folder / NAMES).exists() else Names()
    if find is not None:
        if not known:
            raise ValueError(f"{folder} has no names: give it some, sparsefeat sae names {folder} FILE")
        latent = known.find(find)
        known = Names({latent: known[latent]})
    if as_json:
        print_json({str(latent): name for latent, name in known.items()})
        return
    for latent, name in known.items():
        typer.echo(f"{latent:8d} {name}")
    if not known:
        typer.echo(f"{folder} has no names: give it some, sparsefeat sae names {folder} FILE")
