"""`sparsefeat sae info`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat.cli.opening import SAEChoice, check_hookpoint
from sparsefeat.cli.options import BaseModel, Hookpoint, Json, K, Subfolder
from sparsefeat.cli.outputs import print_json


def info(
    sae: Annotated[str | None, typer.Argument(help="An SAE folder or hub id; default: the embedded ones.")] = None,
    subfolder: Subfolder = None,
    k: K = None,
    hookpoint: Hookpoint = None,
    base_model: BaseModel = None,
    as_json: Json = False,
) -> None:
    """Print what an SAE is: where it lies, width, latents, activation, hookpoint, the model it was trained on."""
    check_hookpoint(hookpoint, "--hookpoint")
    choice = SAEChoice(None if sae is None else [sae], [subfolder] if subfolder else None, option="SAE")
    told = []
    for place, one in zip(choice.places(), choice.open(k=k, hookpoint=hookpoint, base_model=base_model), strict=True):
        config = one.config
        told.append(
            {
                "folder": place,
                "hookpoint": config.hookpoint,
                "base model": config.base_model,
                "activation": config.activation,
                "k": config.k,
                "normalizer": config.normalizer,
                "n_latents": config.n_latents,
                "d_model": config.d_model,
                "bytes": sum(p.numel() * p.element_size() for p in one.parameters()),
                "metadata": config.metadata,
            }
        )
    if as_json:
        print_json(told)
        return
    for it in told:
        typer.echo(f"hookpoint   {it['hookpoint'] or 'not recorded'}")
        typer.echo(f"base model  {it['base model'] or 'not recorded'}")
        typer.echo(f"activation  {it['activation']}" + (f", k = {it['k']}" if it["k"] else ""))
        typer.echo(f"normalizer  {it['normalizer']}")
        typer.echo(f"shape       {it['n_latents']} latents x {it['d_model']}, {it['bytes'] / 2**20:.1f} MiB in memory")
        for name, value in it["metadata"].items():
            typer.echo(f"{name:11s} {value}")
        typer.echo(f"folder      {it['folder']}\n")
