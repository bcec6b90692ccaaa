"""`sparsefeat evaluate card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import quiet_libraries
from sparsefeat.cli.options import Results, Section, Work, results_file, work_folder


def card(
    out: Results = Path("bench/results/card.json"),
    work: Work = Path("build/card"),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer concepts and images: a quarter of an hour.")] = False,
    section: Annotated[
        list[Section] | None, typer.Option(help="Measure this one alone; may be given more than once.")
    ] = None,
) -> None:
    """All methods side by side on the embedded pipeline: the score card (resumable; a few hours)."""
    results_file(out)
    work_folder(work)
    quiet_libraries()
    from sparsefeat.evaluation.card import FULL, QUICK, SECTIONS, evaluate_card

    with keeping(lambda: f"finished parts are in {work}, and the same command goes on from them"):
        sections = SECTIONS if section is None else [one.value for one in section]
        evaluate_card(QUICK if quick else FULL, out, work, sections=sections, said=typer.echo)
    typer.echo(f"wrote {out}")
