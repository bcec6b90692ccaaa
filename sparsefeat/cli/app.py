"""The commands by name. A new one: a file in `commands/` with a function of its name, and that function in a list here."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat import __version__
from sparsefeat.cli.commands.bench import bench
from sparsefeat.cli.commands.collect import collect
from sparsefeat.cli.commands.demo import demo
from sparsefeat.cli.commands.erase import erase
from sparsefeat.cli.commands.evaluate.attribution import attribution
from sparsefeat.cli.commands.evaluate.emoji import emoji
from sparsefeat.cli.commands.evaluate.overhead import overhead
from sparsefeat.cli.commands.evaluate.saes import saes
from sparsefeat.cli.commands.evaluate.scenes import scenes
from sparsefeat.cli.commands.features import features
from sparsefeat.cli.commands.heatmap import heatmap
from sparsefeat.cli.commands.hookpoints import hookpoints
from sparsefeat.cli.commands.sae.check import check
from sparsefeat.cli.commands.sae.convert import convert
from sparsefeat.cli.commands.sae.info import info
from sparsefeat.cli.commands.sae.list import list as list_saes
from sparsefeat.cli.commands.sae.names import names
from sparsefeat.cli.commands.sae.verify import verify
from sparsefeat.cli.commands.steer import steer
from sparsefeat.cli.commands.train import train
from sparsefeat.cli.failures import plain_errors

COMMANDS = (demo, features, steer, erase, heatmap, hookpoints, collect, train, bench)
EVALUATE_COMMANDS = (attribution, emoji, overhead, saes, scenes)
SAE_COMMANDS = (info, list_saes, check, verify, names, convert)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sae_app = typer.Typer(help="Look at sparse autoencoders and convert them.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
evaluate_app = typer.Typer(help="Measure SAEs, erasure and what attaching costs.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
for group, commands in ((app, COMMANDS), (sae_app, SAE_COMMANDS), (evaluate_app, EVALUATE_COMMANDS)):
    for command in commands:
        group.command()(plain_errors(command))


def print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsefeat {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=print_version, is_eager=True)
    ] = False,
) -> None:
    """Sparse features of diffusion models: extract, steer, erase and explain."""
