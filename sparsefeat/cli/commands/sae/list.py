"""`sparsefeat sae list`."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from sparsefeat.cli.options import Json
from sparsefeat.cli.outputs import print_json


def list(
    search: Annotated[str | None, typer.Argument(help="Only what has this in its name or base model.")] = None,
    as_json: Json = False,
) -> None:
    """List published SAEs by the name that `load_sae` and the other commands take."""
    from sparsefeat.sae.published import PUBLISHED_SAES

    wanted = (search or "").casefold()
    found = [sae for sae in PUBLISHED_SAES.values() if wanted in f"{sae.name} {sae.base_model}".casefold()]
    if not found:
        raise ValueError(f"no published SAE in the table has {search!r} in its name or base model: try a shorter word")
    if as_json:
        print_json([dataclasses.asdict(sae) for sae in found])
        return
    for sae in found:
        l0 = "" if sae.l0 is None else f", L0 {sae.l0:g}"
        typer.echo(f"{sae.name:28s} {sae.base_model}, {sae.hookpoint}{l0}, licence: {sae.licence}")
        typer.echo(f"{'':28s} {sae.repository}{'' if sae.subfolder is None else f', {sae.subfolder}'}")
