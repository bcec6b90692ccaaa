"""The commands by name. A new one: a file in `commands/` with a function of its name, and that function in a list here."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparsefeat import __version__
from sparsefeat.cli.commands.bench import bench
from sparsefeat.cli.commands.circuit import circuit
from sparsefeat.cli.commands.collect import collect
from sparsefeat.cli.commands.demo import demo
from sparsefeat.cli.commands.erase import erase
from sparsefeat.cli.commands.evaluate.attribution import attribution
from sparsefeat.cli.commands.evaluate.card import card
from sparsefeat.cli.commands.evaluate.emoji import emoji
from sparsefeat.cli.commands.evaluate.overhead import overhead
from sparsefeat.cli.commands.evaluate.saes import saes
from sparsefeat.cli.commands.evaluate.scenes import scenes
from sparsefeat.cli.commands.evaluate.weights import weights
from sparsefeat.cli.commands.explore import explore
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
from sparsefeat.cli.neighbours import wait_asleep_beside_others

COMMANDS = (demo, explore, features, steer, erase, heatmap, circuit, hookpoints, collect, train, bench)
EVALUATE_COMMANDS = (attribution, card, emoji, overhead, saes, scenes, weights)
SAE_COMMANDS = (info, list_saes, check, verify, names, convert)


class Once(TyperCommand):
    """A command that refuses an option which is given twice, of which the last would be taken without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given: list[Any] = [*self.make_parser(ctx).parse_args(args=list(args))[2]]
        for one in given:
            if not getattr(one, "multiple", True) and not getattr(one, "is_flag", False) and given.count(one) > 1:
                raise typer.BadParameter("it is given more than once; give it once", ctx=ctx, param=one)
        return super().parse_args(ctx, args)


class Commands(TyperGroup):
    """The commands; what their output cannot show, in a locale of ASCII, is a question mark there."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                stream.reconfigure(errors="replace")
        return super().main(*args, **kwargs)


app: typer.Typer = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
sae_app: typer.Typer = typer.Typer(help="Look at sparse autoencoders and convert them.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")
evaluate_app: typer.Typer = typer.Typer(help="Measure SAEs, erasure and what attaching costs.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")
for group, commands in ((app, COMMANDS), (sae_app, SAE_COMMANDS), (evaluate_app, EVALUATE_COMMANDS)):
    for command in commands:
        group.command(cls=Once)(plain_errors(command))


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
    wait_asleep_beside_others()
