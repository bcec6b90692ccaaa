"""`sparsefeat evaluate emoji`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import SAEChoice, quiet_libraries
from sparsefeat.cli.options import Results, path, results_file


def emoji(
    out: Results = Path("bench/results/emoji.json"),
    work: Annotated[
        Path, typer.Option(parser=path, metavar="FOLDER", help="Finished parts are kept here and gone on from.")
    ] = Path("build/evaluation"),
) -> None:
    """Drawing, SAEs and erasure on the embedded pipeline (resumable; about half an hour)."""
    results_file(out)
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; name a folder")
    quiet_libraries()
    from sparsefeat.assets import load_pipeline
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.run_emoji import evaluate_emoji

    with keeping(lambda: f"finished parts are in {work}, and the same command goes on from them"):
        evaluate_emoji(load_pipeline(), SAEChoice(None, None).open(), load_judge(), out, work)
    typer.echo(f"wrote {out}")
