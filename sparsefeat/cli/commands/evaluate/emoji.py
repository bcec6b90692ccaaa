"""`sparsefeat evaluate emoji`."""

from __future__ import annotations

from pathlib import Path

import typer

from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import SAEChoice, quiet_libraries
from sparsefeat.cli.options import Results, Work, results_file, work_folder


def emoji(
    out: Results = Path("bench/results/emoji.json"),
    work: Work = Path("build/evaluation"),
) -> None:
    """Drawing, SAEs and erasure on the embedded pipeline (resumable; about half an hour)."""
    results_file(out)
    work_folder(work)
    quiet_libraries()
    from sparsefeat.assets import load_pipeline
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.run_emoji import evaluate_emoji

    with keeping(lambda: f"finished parts are in {work}, and the same command goes on from them"):
        evaluate_emoji(load_pipeline(), SAEChoice(None, None).open(), load_judge(), out, work)
    typer.echo(f"wrote {out}")
